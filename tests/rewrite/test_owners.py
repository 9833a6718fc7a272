"""Modules of a unit in other forms, and those that its call did not reach."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.report import Report
from tests.pairs import check_close
from tests.patterns.harness import BATCH, SEQUENCE, capture

EXPERTS, HIDDEN = 4, 8


class Experts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, width, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, width) * 0.3)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, pick = torch.where(ids == e)
            rows = F.linear(F.silu(F.linear(x[token], self.up[e])), self.down[e])
            out = out.index_add(0, token, (rows * weights[token, pick, None]).to(x.dtype))
        return out


class OtherExperts(Experts):
    """Of another class, whatever they compute."""


class Routed(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)


class Layer(nn.Module):
    """Experts for text, and narrower ones for images."""

    def __init__(self, kind: type[Experts]) -> None:
        super().__init__()
        self.text, self.image = Routed(Experts(12)), Routed(kind(6))

    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        if images is None or not images.any():
            return x + self.text(flat).view(x.shape)
        own = images.reshape(-1)
        out = torch.zeros_like(flat)
        out[~own] = self.text(flat[~own])
        out[own] = self.image(flat[own])
        return x + out.view(x.shape)


class Model(nn.Module):
    def __init__(self, kind: type[Experts] = Experts) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for _ in range(2))

    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, images)
        return x


X = torch.randn(2, 5, HIDDEN)
IMAGES = torch.arange(10).view(2, 5) % 3 == 0


def statuses(report: Report) -> dict[str, str]:
    return {site.module: site.status for site in report.sites if site.kind == "experts"}


def outcome(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    out = model(*inputs)
    out.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | gradients


def test_experts_that_no_text_reaches_are_captured_as_their_twins_are_called() -> None:
    model = Model()
    original = copy.deepcopy(model)
    moe_compile.optimize(model, example_inputs=(X,))
    found = statuses(moe_compile.report(model))
    names = ("layers.0.text.experts", "layers.0.image.experts")
    assert found == dict.fromkeys(names, "rewritten")
    assert "forward" in vars(model.get_submodule("layers.1.image.experts"))
    check_close(outcome(model, X, IMAGES), outcome(original, X, IMAGES))


def test_those_of_another_class_are_not() -> None:
    found = statuses(moe_compile.explain(Model(OtherExperts), example_inputs=(X,)))
    assert found == {
        "layers.0.text.experts": "rewritten",
        "layers.0.image.experts": "refused",
    }


def test_inputs_with_images_reach_both() -> None:
    found = statuses(moe_compile.explain(Model(OtherExperts), example_inputs=(X, IMAGES)))
    assert set(found.values()) == {"rewritten"}


def test_a_call_that_other_data_may_not_lead_to_is_optional() -> None:
    images = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
    unit = capture(Layer(Experts), torch.randn(BATCH, SEQUENCE, HIDDEN), images)
    found = {call.path: call.optional for call in unit.calls}
    assert found[""] is False
    assert found["image.experts"] is True


class WithZeroExperts(Experts):
    """Of which ids beyond the last give the token itself."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        passed = weights.masked_fill(ids < EXPERTS, 0).sum(-1, keepdim=True)
        return super().forward(x, ids, weights) + x * passed.to(x.dtype)


class ZeroRouted(Routed):
    def __init__(self) -> None:
        super().__init__(WithZeroExperts(12))
        self.gate = nn.Linear(HIDDEN, EXPERTS + 3)


class ZeroModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ZeroRouted() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_experts_captured_alone_know_of_the_ids_beyond_them() -> None:
    model, x = ZeroModel(), torch.randn(40, HIDDEN)
    original = copy.deepcopy(model)
    moe_compile.optimize(model, example_inputs=(x,))
    assert set(statuses(moe_compile.report(model)).values()) == {"rewritten"}
    seen: list[tuple[Tensor, ...]] = []
    own = original.get_submodule("layers.0.experts")
    own.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.autocast("cpu", torch.bfloat16):
        original(x)
        actual, expected = model.get_submodule("layers.0.experts")(*seen[0]), own(*seen[0])
    assert (seen[0][1] >= EXPERTS).any()
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)

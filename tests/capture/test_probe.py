from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from moe_compile.capture.group import group
from moe_compile.capture.probe import Probe, probe
from moe_compile.capture.shadow import Shadow, cast_shadow
from moe_compile.report import Report, Site
from tests.pairs import check_close, make_pair


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Model(nn.Module):
    """Layers that are called with whatever `extra` gives."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def extra(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        extra = self.extra()
        for layer in self.layers:
            x = layer(x, **extra)
        return x


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def explain(model: nn.Module, inputs: Any = (X,)) -> Report:
    return moe_compile.explain(model, example_inputs=inputs)


def probed(model: nn.Module) -> tuple[Shadow, Probe]:
    shadow = cast_shadow(model)
    return shadow, probe(shadow, (X,))


def kinds(report: Report) -> list[tuple[str, str, str]]:
    return [(site.module, site.kind, site.status) for site in report.sites]


def test_keyword_arguments_are_a_call_too() -> None:
    assert kinds(explain(Model(Norm()), {"x": X})) == [("layers.0", "rms_norm", "rewritten")]


class Unpacks(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        _, z = self.layers[1](y)
        return self.layers[2](z)


class Fails(nn.Module):
    """A layer that returns a pair, but does not run on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if type(x) is not Tensor:
            raise TypeError("it takes real tensors")
        return x, x * self.weight


def test_a_model_that_fails_while_it_is_probed_is_reported_up_to_there() -> None:
    report = explain(Unpacks(Norm(), Fails(), Norm()))
    by_module = {site.module: site for site in report.sites}
    assert by_module["layers.0"].status == "rewritten"
    assert by_module["layers.1"].status == "refused"
    assert by_module["layers.2"].status == "refused"
    reason = str(by_module["layers.2"].reason)
    assert reason.startswith("the model's own code fails before it gets here: ValueError: ")
    assert reason.endswith("pass example_inputs")


class Converts(nn.Module):
    """Casts a module to the dtype that it has, in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)
        self.norm = Norm()

    def forward(self, x: Tensor) -> Tensor:
        self.gate = self.gate.to(torch.float32)
        return self.norm(self.gate(x))


def test_a_conversion_that_changes_nothing() -> None:
    models = make_pair(Model(Converts()), example_inputs=(X,))
    report = moe_compile.report(models.optimized)
    assert kinds(report) == [("layers.0.norm", "rms_norm", "rewritten")]
    check_close({"x": models.optimized(X)}, {"x": models.original(X)})


class Remembers(nn.Module):
    """Leaves tensors behind on the module, and reads them in the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x if self.last is None else x + self.last)
        self.last = x.detach()
        return x


def test_what_a_forward_leaves_on_a_module_is_forgotten() -> None:
    shadow, found = probed(Model(Remembers()))
    groups = group(shadow, found.calls)
    assert [g.problem for g in groups] == [None]
    layer: Any = shadow.model.get_submodule("layers.0")
    assert layer.last is None
    assert "forward" not in vars(layer)


class Store:
    """As a key-value cache."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


class Caches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.second = Norm()

    def forward(self, x: Tensor, store: Store) -> Tensor:
        x = self.norm(x)
        store.tensors.append(x)
        return self.second(sum(store.tensors, torch.zeros_like(x)))


class WithStore(Model):
    def extra(self) -> dict[str, Any]:
        return {"store": Store()}


def test_a_layer_with_a_store_is_captured_by_its_children() -> None:
    models = make_pair(WithStore(Caches(), Caches()), example_inputs=(X,))
    report = moe_compile.report(models.optimized)
    rewritten = [(s.module, s.layers) for s in report.sites if s.status == "rewritten"]
    assert rewritten == [("layers.0.norm", 2), ("layers.0.second", 2)] or rewritten == [
        ("layers.0.norm", 4)
    ]
    check_close({"x": models.optimized(X)}, {"x": models.original(X)})


class HandsOn(nn.Module):
    """Gets a store, and does not look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def forward(self, x: Tensor, store: Store) -> Tensor:
        return self.norm(x)


class Attends(nn.Module):
    """Attention that keeps tensors in a store, without a part that could be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, store: Store) -> Tensor:
        store.tensors.append(x)
        return x * self.weight


def test_a_layer_that_hands_a_store_on_is_captured() -> None:
    shadow, found = probed(WithStore(HandsOn(), HandsOn()))
    (layers,) = group(shadow, found.calls)
    assert layers.problem is None
    assert layers.names == ["layers.0", "layers.1"]


def test_what_keeps_tensors_in_a_store_is_refused() -> None:
    (site,) = explain(WithStore(Attends(), Attends())).sites
    assert (site.module, site.layers, site.status) == ("layers.0", 2, "refused")
    assert (
        site.reason == "its code could not be captured: HoldsTensors: it keeps tensors in a Store"
    )


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.rand(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up.sum(0)


class Tables(nn.Module):
    """Places in an image, by row and by column."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.places = nn.Parameter(torch.rand(2, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.places.sum(0)[: x.shape[1]]


class Row(nn.Module):
    """A row of MLPs beside a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        mlps = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)]
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


class Below(nn.Module):
    """The matrices of four experts, below each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.rand(4 * 6, 8))
        self.down = nn.Parameter(torch.rand(4 * 6, 8))

    def forward(self, scores: Tensor) -> Tensor:
        return scores @ self.up.view(4, 48)


class Flat(nn.Module):
    """Such experts beside a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = Below()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.router(x))


class TwoPaths(nn.Module):
    """The experts of images are beside those of text."""

    def __init__(self, images: nn.Module) -> None:
        super().__init__()
        self.norm = Norm()
        self.images = images

    def forward(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        return self.norm(x) if pixels is None else self.images(pixels)


@pytest.mark.parametrize(
    ("images", "name"),
    [(Experts(), "images"), (Row(), "images.experts"), (Flat(), "images.experts")],
)
def test_experts_that_the_probe_does_not_reach_are_refused(images: nn.Module, name: str) -> None:
    sites = explain(Model(TwoPaths(images), TwoPaths(images))).sites
    reason = "a call with the example inputs does not reach it; pass example_inputs that do"
    (site,) = [site for site in sites if site.kind == "experts"]
    assert site == Site(f"layers.0.{name}", 1, "experts", None, "refused", reason)


def test_experts_that_are_reached_are_not() -> None:
    assert explain(Model(Experts())).sites == ()


@pytest.mark.parametrize("beside", [nn.Conv1d(8, 8, 3), nn.ModuleList([Norm(), Norm()]), Tables()])
def test_what_is_no_expert_is_not(beside: nn.Module) -> None:
    assert {site.kind for site in explain(Model(TwoPaths(beside))).sites} == {"rms_norm"}


class Looping(nn.Module):
    """Counts the positions of its sequence, and has a child that needs no count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def forward(self, x: Tensor) -> Tensor:
        steps = [x[:, i : i + 1] * i for i in range(x.shape[1])]
        return self.norm(x + torch.cat(steps, 1))


def test_a_size_that_code_counts_to_stays_unknown() -> None:
    shadow, found = probed(Model(Looping(), Looping()))
    group(shadow, found.calls)
    for size in (shadow.batch, shadow.sequence):
        assert size.node.expr.free_symbols, f"it was taken to be {size}"

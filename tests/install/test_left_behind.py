"""Code that hands something on beside its result, such as a router its state to the next one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from tests.pairs import check_close, make_pair

WIDTH, EXPERTS = 8, 4


class Block(nn.Module):
    """Its own code is that of the router and of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 12, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 12) / 3)

    def mixed(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, picks = logits.softmax(-1).topk(2, dim=-1)
        rows = x.reshape(-1, WIDTH)
        out = torch.zeros_like(rows)
        for expert in range(EXPERTS):
            token, slot = torch.where(picks == expert)
            hidden = F.silu(F.linear(rows[token], self.up[expert]))
            part = F.linear(hidden, self.down[expert]) * weights[token, slot, None]
            out = out.index_add(0, token, part)
        return x + out.view_as(x)


class HandsOn(Block):
    """Its logits are an output, and the next block's argument."""

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.gate(x.reshape(-1, WIDTH))
        logits = logits if before is None else logits + 0.5 * before
        return self.mixed(x, logits), logits


class HandingOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HandsOn() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for layer in self.layers:
            x, state = layer(x, state)
        return x


class Shared:
    """What is not part of any module's arguments."""

    logits: Tensor | None = None


class Keeps(Block):
    """Its logits are left where the next block finds them."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x.reshape(-1, WIDTH))
        if self.shared.logits is not None:
            logits = logits + 0.5 * self.shared.logits
        self.shared.logits = logits
        return self.mixed(x, logits)


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()
        self.layers = nn.ModuleList(Keeps(self.shared) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.shared.logits = None
        for layer in self.layers:
            x = layer(x)
        self.shared.logits = None
        return x


class KeepsInItself(Block):
    """Its logits stay with it."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.gate(x.reshape(-1, WIDTH))
        return self.mixed(x, self.last)


class LooksBack(nn.Module):
    """Adds something of what the blocks left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KeepsInItself() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self.layers)
        for layer in layers:
            x = layer(x)
        return x + sum(layer.last.square().mean() for layer in layers)


def run(model: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach()} | grads


@pytest.mark.parametrize("kind", [HandingOn, Keeping, LooksBack])
def test_what_routers_hand_on_arrives(kind: type[nn.Module]) -> None:
    models = make_pair(kind(), example_inputs=(torch.randn(2, 5, WIDTH),))
    check_close(run(models.optimized), run(models.original))
    sites = [s for s in moe_compile.report(models.optimized).sites if s.kind == "experts"]
    assert sum(site.layers for site in sites) == 3
    assert all(site.reason for site in sites if site.status != "rewritten")


def test_experts_that_get_the_state_as_an_argument_are_rewritten() -> None:
    models = make_pair(HandingOn(), example_inputs=(torch.randn(2, 5, WIDTH),))
    sites = [s for s in moe_compile.report(models.optimized).sites if s.kind == "experts"]
    assert {site.status for site in sites} == {"rewritten"}


class Counts(Block):
    """Counts in a buffer how often each expert is picked."""

    load: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x.reshape(-1, WIDTH))
        with torch.no_grad():
            self.load.add_(logits.softmax(-1).sum(0))
        return self.mixed(x, logits)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Counts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_buffer_that_the_code_writes_is_written() -> None:
    models = make_pair(Counting(), example_inputs=(torch.randn(2, 5, WIDTH),))
    for _ in range(2):
        check_close(run(models.optimized), run(models.original))
    check_close(dict(models.optimized.named_buffers()), dict(models.original.named_buffers()))
    assert all(models.original.layers[0].load > 0)


class Doubles(Block):
    """Changes its argument, which its caller uses afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.mixed(x, self.gate(x.reshape(-1, WIDTH)))


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Doubles() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * 1.0
            x = layer(x) + x
        return x


def test_an_argument_that_the_code_changes_is_changed() -> None:
    models = make_pair(Doubling(), example_inputs=(torch.randn(2, 5, WIDTH),))
    check_close(run(models.optimized), run(models.original))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(LooksBack, "last"), (Counting, "load"), (Doubling, "changes its argument in place")],
)
def test_code_that_leaves_something_is_refused(kind: type[nn.Module], reason: str) -> None:
    report = moe_compile.explain(kind(), example_inputs=(torch.randn(2, 5, WIDTH),))
    sites = [site for site in report.sites if site.kind == "experts"]
    assert {site.status for site in sites} == {"refused"}
    assert all(reason in (site.reason or "") for site in sites)

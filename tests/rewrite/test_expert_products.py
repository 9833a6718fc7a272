"""Products with experts' weights are found, whatever picks rows; other weights in rows are none."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.passes import Normalize, RaiseExperts, RaiseMLPs
from moe_compile.rewrite.expert_products import expert_products
from tests.patterns.harness import BATCH, SEQUENCE, capture, normal, unit_of

Weights = dict[str, Tensor]

E, H, N = 4, 8, 6
STACKS = {"gate": normal(E, H), "up": normal(E, N, H), "down": normal(E, H, N)}
FLAT = {"gate": normal(E, H), "up": normal(E * N, H), "down": normal(E * N, H)}
X = normal(BATCH, SEQUENCE, H)


def expert(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.silu(rows @ up.T) @ down.T


def mixed(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert's result for every token, weighed."""
    results = [expert(x, up[e], down[e]) * weights[..., e, None] for e in range(E)]
    return torch.stack(results).sum(0)


def softly(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return mixed(x, F.linear(x, gate).softmax(-1), up, down)


def above_a_threshold(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    scores = F.linear(x, gate).sigmoid()
    hidden = torch.einsum("bth,enh->bten", x, up).relu()
    weights = torch.where(scores > 0.5, scores, 0.0)
    return torch.einsum("bten,ehn,bte->bth", hidden, down, weights)


def picked_by_experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = x.reshape(-1, H)
    weights, tokens = F.linear(rows, gate).softmax(-1).t().topk(2, dim=-1)
    out = torch.zeros_like(rows)
    for e in range(E):
        result = expert(rows[tokens[e]], up[e], down[e]) * weights[e, :, None]
        out = out.index_add(0, tokens[e], result)
    return out


def by_sign(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = x.reshape(-1, H)
    ids = (rows[:, 0] > 0).long() * 2 + (rows[:, 1] > 0).long()
    out = torch.zeros_like(rows)
    for e in range(E):
        (token,) = torch.where(ids == e)
        out = out.index_add(0, token, expert(rows[token], up[e], down[e]))
    return out


def of_each_row(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = x.reshape(-1, H)
    return (up[(rows[:, 0] > 0).long()] @ rows.unsqueeze(-1)).squeeze(-1)


def sliced(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    scores, parts = F.linear(x, gate).softmax(-1), [slice(e * N, e * N + N) for e in range(E)]
    hidden = [F.silu(x @ up[p].T) @ down[p] * scores[..., e, None] for e, p in enumerate(parts)]
    return torch.stack(hidden).sum(0)


def viewed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return mixed(x, F.linear(x, gate).softmax(-1), up.view(E, N, H), down.view(E, N, H).mT)


@pytest.mark.parametrize(
    ("function", "weights"),
    [
        (softly, STACKS),
        (above_a_threshold, STACKS),
        (picked_by_experts, STACKS),
        (by_sign, STACKS),
        (of_each_row, STACKS),
        (sliced, FLAT),
        (viewed, FLAT),
    ],
)
def test_whatever_picks_rows(function: Callable[..., Tensor], weights: Weights) -> None:
    assert list(expert_products(unit_of(function, X, **weights).graph)) == [""]


class Heads(nn.Module):
    """Heads of their own, layers in a list, thirds of one matrix: nothing is chosen from them."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(normal(2, H, 4))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(H, 6), nn.Linear(6, H)) for _ in "abc")
        self.thirds = nn.Parameter(normal(3 * H, H))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bth,nhd->btnd", x, self.query).flatten(2)
        for layer in self.layers:
            x = x + layer(x)
        first, second, third = (F.linear(x, self.thirds[i * H : i * H + H]) for i in range(3))
        return first * second * third


class Tasks(nn.Module):
    """A gate for each task over the same experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(H, 3) for _ in range(2))
        self.shared = nn.Module()
        self.shared.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        experts: nn.ModuleList = self.shared.experts  # type: ignore[assignment]
        results = torch.stack([expert(x) for expert in experts], -1)
        return [(results * gate(x).softmax(-1).unsqueeze(-2)).sum(-1) for gate in self.gates]


@pytest.mark.parametrize(("module", "found"), [(Heads(), []), (Tasks(), ["shared.experts"])])
def test_holders(module: nn.Module, found: list[str]) -> None:
    unit = capture(module, X)
    Normalize().run(unit)
    assert list(expert_products(unit.graph)) == found


class Gated(nn.Module):
    """An expert that is a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, N), nn.Linear(H, N), nn.Linear(N, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixed(nn.Module):
    """Every token through every expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleList(Gated() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(
            (expert(x) * weights[..., e, None] for e, expert in enumerate(self.experts)),
            torch.zeros_like(x),
        )


def test_experts_that_were_rewritten_to_mlps_count() -> None:
    unit = capture(Mixed(), X)
    Normalize().run(unit)
    assert list(expert_products(unit.graph)) == ["experts"]
    assert RaiseMLPs().run(unit) == E
    assert list(expert_products(unit.graph)) == ["experts"]


def test_what_is_rewritten_does_not_count() -> None:
    def loop(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, ids = F.linear(x, gate).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(E):
            token, pick = torch.where(ids == e)
            rows = expert(x[token], up[e], down[e]) * weights[token, pick, None]
            out = out.index_add(0, token, rows)
        return out

    unit = unit_of(loop, normal(BATCH, H), **STACKS)
    assert list(expert_products(unit.graph)) == [""]
    assert RaiseExperts().run(unit) == 1
    assert not expert_products(unit.graph)

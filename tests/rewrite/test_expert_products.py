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
Route = Callable[[Tensor], tuple[Tensor, Tensor]]

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


def stacked(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert's result for every token, weighed, in products with whole stacks."""
    hidden = torch.einsum("bth,enh->bten", x, up)
    return (torch.einsum("bten,ehn->bteh", F.silu(hidden), down) * weights.unsqueeze(-1)).sum(2)


def with_scores_to_spare(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The router has more scores; a mask is made of some."""
    scores = F.linear(x, torch.cat([gate, gate])).sigmoid()[..., :E]
    return stacked(x, scores.masked_fill(scores < 0.5, 0.0), up, down)


def masked_with_scores_to_spare(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    scores = F.linear(x, torch.cat([gate, gate])).sigmoid()
    return stacked(x, scores.masked_fill(scores < 0.5, 0.0)[..., :E], up, down)


def softly_with_scores_to_spare(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return stacked(x, F.linear(x, torch.cat([gate, gate]))[..., :E].softmax(-1), up, down)


def hashed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    ids = (x[..., 0] * 100).long() % E
    return stacked(x, (ids.unsqueeze(-1) == torch.arange(E)).to(x.dtype), up, down)


def by_distance(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    distances = (x.unsqueeze(-2) - gate).pow(2).sum(-1)
    return stacked(x, (-distances).softmax(-1), up, down)


def in_slots(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert gets two mixtures of all tokens, and every token a mixture of all results."""
    scores = F.linear(x, torch.cat([gate, gate]))
    rows = (scores.softmax(1).mT @ x).unflatten(1, (E, 2))
    hidden = torch.einsum("besh,enh->besn", rows, up).relu()
    results = torch.einsum("besn,ehn->besh", hidden, down).flatten(1, 2)
    return scores.softmax(-1) @ results


@pytest.mark.parametrize(
    ("function", "weights"),
    [
        (with_scores_to_spare, STACKS),
        (masked_with_scores_to_spare, STACKS),
        (softly_with_scores_to_spare, STACKS),
        (hashed, STACKS),
        (by_distance, STACKS),
        (in_slots, STACKS),
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
        self.query, self.key = nn.Parameter(normal(2, H, 4)), nn.Parameter(normal(2, H, 4))
        self.shares = nn.Parameter(normal(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(H, 6), nn.Linear(6, H)) for _ in "abc")
        self.thirds = nn.Parameter(normal(3 * H, H))

    def forward(self, x: Tensor) -> Tensor:
        query = torch.einsum("bth,nhd->bntd", x, self.query)
        key = torch.einsum("bth,nhd->bndt", x, self.key)
        rows = x.unflatten(-1, (2, 4)).transpose(1, 2)
        x = ((query @ key).softmax(-1) @ rows).transpose(1, 2).flatten(2)
        for layer, share in zip(self.layers, self.shares.softmax(-1), strict=True):
            x = x + layer(x) * share
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


SHARED = 3


class Stack(nn.Module):
    """Experts whose products are with whole stacks; weights are for what they compute inside."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Parameter(normal(count, H, N)), nn.Parameter(normal(count, H, N))
        self.down = nn.Parameter(normal(count, N, H))

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        rows = x.reshape(1, -1, H).expand(len(self.up), -1, -1)
        gate = rows @ self.gate
        hidden = torch.where(gate > 0, gate, 0.1 * gate) * (rows @ self.up)
        if weights is not None:
            hidden = hidden * weights.reshape(-1, len(self.up), 1).transpose(0, 1)
        return (hidden @ self.down).sum(0).view_as(x)


class Grouped(nn.Module):
    """Each part of the features has a matrix of its own, in two layers."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.second = nn.Linear(H // groups, H), nn.Linear(H // groups, H)

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        for layer in (self.first, self.second):
            rows = x.reshape(-1, self.groups, H // self.groups).transpose(0, 1)
            parts = layer.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
            x = torch.bmm(rows, parts).transpose(0, 1).reshape(x.shape).relu()
        return x


def masked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Some scores decide where a token is routed; the others are weights as they are."""
    weights = scores.sigmoid()
    routed = weights[..., :E]
    return torch.where(routed > 0.5, routed, 0.0), weights[..., E:]


def normalized_with_picks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the picks and those of shared experts add up to one."""
    picked, ids = scores[..., :E].topk(2)
    weights = torch.cat([picked, scores[..., E:]], -1).sigmoid().log()
    weights = (weights - weights.logsumexp(-1, keepdim=True)).exp()
    return torch.zeros_like(scores[..., :E]).scatter(-1, ids, weights[..., :2]), weights[..., 2:]


class Block(nn.Module):
    """A routed mixture, and beside it, or after it, a layer that every token goes through."""

    def __init__(self, dense: nn.Module, route: Route, **how: bool) -> None:
        super().__init__()
        self.router, self.experts, self.dense = nn.Linear(H, E + SHARED), Stack(E), dense
        self.route, self.how = route, how

    def forward(self, x: Tensor) -> Tensor:
        routed, shared = self.route(self.router(x))
        result = self.experts(x, routed)
        rows = x + result if self.how["after"] else x
        return x + result + self.dense(rows, shared if self.how["weighed"] else None)


@pytest.mark.parametrize(
    ("dense", "weighed"), [(Stack(SHARED), True), (Stack(SHARED), False), (Grouped(2), False)]
)
@pytest.mark.parametrize("route", [masked, normalized_with_picks])
@pytest.mark.parametrize("after", [False, True])
def test_dense_layers_beside_a_mixture(
    dense: nn.Module, weighed: bool, route: Route, after: bool
) -> None:
    unit = capture(Block(dense, route, weighed=weighed, after=after), X)
    Normalize().run(unit)
    assert list(expert_products(unit.graph)) == ["experts"]


def test_a_mixture_of_as_many_beside_a_dense_layer() -> None:
    unit = capture(Block(Stack(E), masked, weighed=False, after=False), X)
    Normalize().run(unit)
    assert list(expert_products(unit.graph)) == ["experts"]


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


class Sequence(nn.Module):
    """A mixture with as many experts as the projection before it has groups."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.project = Grouped(E), nn.Linear(H, H)
        self.router, self.experts = nn.Linear(H, E), Stack(E)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        x = x + self.project(self.grouped(x, None))
        return x + self.experts(x, weights)


def test_a_mixture_of_as_many_after_a_dense_layer() -> None:
    unit = capture(Sequence(), X)
    Normalize().run(unit)
    assert list(expert_products(unit.graph)) == ["experts"]


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

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.passes import RaiseExperts
from moe_compile.patterns import ExpertLoop
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.harness import SEQUENCE, assert_refused, canonical_node, normal, unit_of
from tests.patterns.idioms import EXPERTS, experts_unit, swiglu
from tests.patterns.proven import CHOICES, Choice, assert_raised_by, assert_same_sum

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def body(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(swiglu(F.linear(rows, up)), down)


def hit_only(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Those that some token picked, as transformers' eager experts."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, EXPERTS).permute(2, 1, 0)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        expert = hit[0]
        if expert == EXPERTS:
            continue
        pick, token = torch.where(mask[expert])
        rows = body(x[token], up[expert], down[expert])
        out.index_add_(0, token, rows * weights[token, pick, None])
    return out


def one_class_more(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Those that some token picked; none may be the number after the last (Dbrx, 5.24)."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, EXPERTS + 1).permute(2, 1, 0)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        pick, token = torch.where(mask[hit[0]])
        rows = body(x[token], up[hit[0]], down[hit[0]])
        out.index_add_(0, token, rows * weights[token, pick, None])
    return out


def by_mask(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Assigned under boolean masks, as DeepSeek's code in training."""
    flat, rows = ids.view(-1), x.repeat_interleave(ids.shape[1], dim=0)
    out = torch.empty_like(rows)
    for expert in range(EXPERTS):
        out[flat == expert] = body(rows[flat == expert], up[expert], down[expert])
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def by_counts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sorted and split by counts on the host, as DeepSeek's code in evaluation."""
    order, results, start = ids.view(-1).argsort(), list[Tensor](), 0
    rows, counts = x[order // ids.shape[1]], F.one_hot(ids.view(-1), EXPERTS).sum(0)
    for expert, count in enumerate(counts.cpu().numpy()):
        if count == 0:
            continue
        results.append(body(rows[start : start + count], up[expert], down[expert]))
        start = start + count
    joined = torch.cat(results)
    out = torch.empty_like(joined)
    out[order] = joined
    return (out.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def by_split(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sorted, and split by a histogram on the host; added to what is as long as all picks."""
    order, counts = ids.flatten().argsort(), torch.bincount(ids.flatten(), minlength=EXPERTS)
    chunks = torch.split(x[order // ids.shape[1]], counts.tolist())
    joined = torch.cat([body(c, u, d) for c, u, d in zip(chunks, up, down, strict=True)])
    weighed = joined * weights.reshape(-1)[order].unsqueeze(-1)
    return weighed[order.argsort()].view(*ids.shape, -1).sum(1)


def two_loops(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each product a loop of its own, the activation between them on all rows."""
    order = ids.view(-1).argsort()
    sizes = F.one_hot(ids.view(-1), EXPERTS).sum(0).tolist()
    rows = x[order // ids.shape[1]].split(sizes)
    hidden = torch.cat([F.linear(r, w) for r, w in zip(rows, up, strict=True)])
    rows = swiglu(hidden).split(sizes)
    joined = torch.cat([F.linear(r, w) for r, w in zip(rows, down, strict=True)])
    weighed = joined * weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // ids.shape[1], weighed)


def everywhere(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert sees every token."""
    share = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        out = out + share[:, expert, None] * body(x, up[expert], down[expert])
    return out


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_before_is_raised_and_proven(choice: Choice) -> None:
    assert_raised_by(ExpertLoop(), choice)
    assert_same_sum(ExpertLoop(), choice)


def routed(function: Experts) -> UnitGraph:
    """The function behind a router, whose picks differ."""

    def block(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, ids = scores.topk(2, dim=-1)
        return function(x, ids, weights, up, down)

    weights = {"up": normal(EXPERTS, 12, 8), "down": normal(EXPERTS, 8, 6)}
    return unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS), **weights)


@pytest.mark.parametrize(
    "function", [hit_only, one_class_more, by_mask, by_counts, by_split, two_loops, everywhere]
)
def test_rewrites_any_routing_that_is_a_weighted_sum(function: Experts) -> None:
    unit = routed(function)
    assert RaiseExperts().run(unit) == 1
    node = canonical_node(unit)
    assert node.meta["made_by"][1] == "expert_loop"
    assert [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"] == ["up", "down"]


def doubled(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The weights squared: a sum, but with other weights at each pick than the ones proven."""
    return everywhere(x, ids, weights, up, down) * everywhere(x, ids, weights, up, down)


def largest(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    share = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    every = [share[:, e, None] * body(x, up[e], down[e]) for e in range(EXPERTS)]
    return torch.stack(every).amax(0)


def expert_choice(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Experts pick tokens."""
    share = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    best, token = share.topk(2, dim=0)
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        rows = body(x[token[:, e]], up[e], down[e]) * best[:, e, None]
        out = out.index_add(0, token[:, e], rows)
    return out


def centred(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """An expert sees the mean of its tokens."""
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, pick = torch.where(ids == e)
        rows = x[token] - x[token].mean(0, keepdim=True)
        out = out.index_add(0, token, body(rows, up[e], down[e]) * weights[token, pick, None])
    return out


def unlike(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert has another activation."""
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, pick = torch.where(ids == e)
        hidden = F.linear(x[token], up[e])
        gate, value = hidden.chunk(2, dim=-1)
        hidden = swiglu(hidden) if e else F.gelu(gate) * value
        out = out.index_add(0, token, F.linear(hidden, down[e]) * weights[token, pick, None])
    return out


@pytest.mark.parametrize("function", [doubled, largest, expert_choice, centred, unlike])
def test_refuses_look_alikes(function: Experts) -> None:
    assert_refused(RaiseExperts(), ExpertLoop(), routed(function), ".+")


def test_picks_that_may_repeat_are_added() -> None:
    """`everywhere` keeps one weight of two equal picks, the canonical op adds both."""
    reason = "the result is no weighted sum of the picked experts.*"
    assert_refused(RaiseExperts(), ExpertLoop(), experts_unit(everywhere), reason)


def test_the_sum_ends_after_many_experts_that_compute_nothing() -> None:
    """As LongCat-Flash's: more of them than nodes are tried as the result."""
    idle = 12

    def block(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, ids = scores.topk(2, dim=-1)
        out, mask = torch.zeros_like(x), F.one_hot(ids, EXPERTS + idle).permute(2, 1, 0)
        for expert in range(EXPERTS + idle):
            pick, token = torch.where(mask[expert])
            rows = x[token]
            if expert < EXPERTS:
                rows = body(rows, up[expert], down[expert])
            out.index_add_(0, token, rows * weights[token, pick, None])
        return out

    weights = {"up": normal(EXPERTS, 12, 8), "down": normal(EXPERTS, 8, 6)}
    unit = unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS + idle), **weights)
    assert RaiseExperts().run(unit) == 1


def with_biases(*names: str) -> UnitGraph:
    """Experts of two first products and a last one, each with a bias where it is named."""

    def block(x: Tensor, scores: Tensor, **stacks: Tensor) -> Tensor:
        weights, ids = scores.topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, pick = torch.where(ids == e)
            own = x[token]
            gate = own @ stacks["gate"][e]
            gate = gate + stacks["gate_bias"][e] if "gate_bias" in stacks else gate
            up = own @ stacks["up"][e]
            up = stacks["up_bias"][e] + up if "up_bias" in stacks else up
            rows = (F.silu(gate) * up) @ stacks["down"][e]
            rows = rows + stacks["down_bias"][e] if "down_bias" in stacks else rows
            out = out.index_add(0, token, rows * weights[token, pick, None])
        return out

    stacks = {"gate": normal(EXPERTS, 8, 6), "up": normal(EXPERTS, 8, 6)}
    stacks["down"] = normal(EXPERTS, 6, 8)
    widths = {"gate_bias": 6, "up_bias": 6, "down_bias": 8}
    stacks |= {name: normal(EXPERTS, widths[name]) for name in names}
    return unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS), **stacks)


@pytest.mark.parametrize(
    "names", [("gate_bias", "up_bias", "down_bias"), ("gate_bias", "up_bias"), ("down_bias",)]
)
def test_biases_that_are_added_apart_are_the_experts_own(names: tuple[str, ...]) -> None:
    unit = with_biases(*names)
    assert RaiseExperts().run(unit) == 1, unit.near_misses["expert_loop"].reason
    taken = {str(n.target) for n in unit.graph.nodes if n.op == "get_attr" and n.users}
    assert taken == {"gate", "up", "down", *names}


def test_a_bias_of_some_first_products_is_refused() -> None:
    reason = "only some of an expert's first products have a bias"
    assert_refused(RaiseExperts(), ExpertLoop(), with_biases("gate_bias"), reason)

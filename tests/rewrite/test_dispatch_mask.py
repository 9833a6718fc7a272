"""Picks that an expert's capacity drops: whatever drops them ends in a mask."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.passes import RaiseExperts
from moe_compile.patterns import ExpertLoop
from tests.pairs import check_close
from tests.patterns.harness import (
    SEQUENCE,
    Idiom,
    assert_refused,
    canonical_node,
    normal,
    unit_of,
)
from tests.patterns.idioms import EXPERTS, swiglu

CAPACITY = 2
Block = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def within(hot: Tensor) -> Tensor:
    """One-hot rows, those of tokens beyond their expert's capacity zero."""
    return hot * (hot.cumsum(0) <= CAPACITY)


def expert(rows: Tensor, up: Tensor, down: Tensor, number: int) -> Tensor:
    return F.linear(swiglu(F.linear(rows, up[number])), down[number])


def top1(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    weights, ids = scores.softmax(-1).max(-1)
    mask, out = within(F.one_hot(ids, EXPERTS)), torch.zeros_like(x)
    for e in range(EXPERTS):
        token = torch.where(mask[:, e])[0]
        out = out.index_add(0, token, expert(x[token], up, down, e) * weights[token, None])
    return out


def compared(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Booleans instead of one-hot rows."""
    weights, ids = scores.softmax(-1).max(-1)
    hot = ids.unsqueeze(-1) == torch.arange(EXPERTS)
    mask, out = hot & (hot.int().cumsum(0) <= CAPACITY), torch.zeros_like(x)
    for e in range(EXPERTS):
        token = torch.where(mask[:, e])[0]
        out = out.index_add(0, token, expert(x[token], up, down, e) * weights[token, None])
    return out


def sized(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The capacity is a share of the tokens."""
    weights, ids = scores.softmax(-1).max(-1)
    hot, out = F.one_hot(ids, EXPERTS), torch.zeros_like(x)
    mask = hot * (hot.cumsum(0) * EXPERTS <= x.shape[0])
    for e in range(EXPERTS):
        token = torch.where(mask[:, e])[0]
        out = out.index_add(0, token, expert(x[token], up, down, e) * weights[token, None])
    return out


def everywhere(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert sees every token; what is dropped has a weight of zero."""
    share = scores.softmax(-1)
    share, out = share * within(F.one_hot(share.argmax(-1), EXPERTS)), torch.zeros_like(x)
    for e in range(EXPERTS):
        out = out + expert(x, up, down, e) * share[:, e, None]
    return out


def by_pick(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A mask [tokens, 2, experts]: of two picks one may be dropped."""
    weights, ids = scores.softmax(-1).topk(2)
    mask, out = within(F.one_hot(ids, EXPERTS)), torch.zeros_like(x)
    for e in range(EXPERTS):
        token, pick = torch.where(mask[..., e])
        out = out.index_add(0, token, expert(x[token], up, down, e) * weights[token, pick, None])
    return out


def by_weight(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two picks, each with a mask of its own; who goes where follows from the weights."""
    share, out = scores.softmax(-1), torch.zeros_like(x)
    first = F.one_hot(share.argmax(-1), EXPERTS)
    second = F.one_hot(share.masked_fill(first.bool(), -1.0).argmax(-1), EXPERTS)
    gates = share * within(first) + share * within(second)
    mask = gates.bool()
    for e in range(EXPERTS):
        token = torch.where(mask[:, e])[0]
        out = out.index_add(0, token, expert(x[token], up, down, e) * gates[token, e, None])
    return out


BLOCKS = {top1: 1, compared: 1, sized: 1, everywhere: 1, by_pick: 2, by_weight: 2}
"""With how many picks a token has."""


def weights() -> dict[str, Tensor]:
    return {"up": normal(EXPERTS, 12, 8), "down": normal(EXPERTS, 8, 6)}


class Model(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Idiom(block, weights())])

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        return self.layers[0](x, scores)


def outcome(block: nn.Module, x: Tensor, scores: Tensor) -> dict[str, Tensor]:
    x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
    out = block(x, scores)
    out.sin().sum().backward()
    leaves = {"x": x, "scores": scores, **dict(block.named_parameters())}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize(
    ("block", "picks"), BLOCKS.items(), ids=lambda p: getattr(p, "__name__", p)
)
def test_dropped_picks_become_ids_of_no_expert(block: Block, picks: int) -> None:
    unit = unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS), **weights())
    assert RaiseExperts().run(unit) == 1, unit.near_misses["expert_loop"].reason
    ids = canonical_node(unit).args[1]
    assert isinstance(ids, torch.fx.Node)
    assert ids.meta["val"].shape[1] == picks


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_values_and_gradients_stay(block: Block) -> None:
    model = Model(block)
    original, x, scores = copy.deepcopy(model), normal(11, 8), normal(11, EXPERTS)
    optimized = moe_compile.optimize(model, example_inputs=(x, scores))
    (site,) = [s for s in moe_compile.report(optimized).sites if s.kind == "experts"]
    assert site.status == "rewritten", site.reason
    found, wanted = (outcome(m, x, scores) for m in (optimized, original))
    check_close(found, wanted)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(x).softmax(-1).max(-1, keepdim=True)
        return within(F.one_hot(ids, EXPERTS)), weights


class Masked(nn.Module):
    """Gets a mask [tokens, 1, experts]: that it is one shows where it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(w) for w in weights().values())

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, pick = torch.where(mask[..., e])
            rows = expert(x[token], self.up, self.down, e) * weights[token, pick, None]
            out = out.index_add(0, token, rows.to(x.dtype))
        return out


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Masked()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x, *self.router(x))


def test_a_module_that_gets_a_mask_is_rewritten_in_every_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Sequential(Split()), normal(11, 8)
    original = copy.deepcopy(model)
    expected = original(x), original.eval()(x)
    moe_compile.optimize(model, example_inputs=(x,))
    monkeypatch.setattr(Masked, "forward", None)
    torch.testing.assert_close(model(x), expected[0])
    torch.testing.assert_close(model.eval()(x), expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(x).isfinite().all()


def passed_on(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What is dropped comes back as it was, as in the first code of Switch transformers."""
    weights, ids = scores.softmax(-1).max(-1)
    mask, out = within(F.one_hot(ids, EXPERTS)), x.clone()
    for e in range(EXPERTS):
        token = torch.where(mask[:, e])[0]
        out = out.index_copy(0, token, expert(x[token], up, down, e))
    return out * weights[:, None]


def counted(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Places in the queue of an expert weigh: they are no mask."""
    weights, ids = scores.softmax(-1).max(-1)
    hot, out = F.one_hot(ids, EXPERTS), torch.zeros_like(x)
    places = hot * hot.cumsum(0)
    for e in range(EXPERTS):
        token = torch.where(places[:, e])[0]
        own = weights[token, None] * places[token, e, None]
        out = out.index_add(0, token, expert(x[token], up, down, e) * own)
    return out


def swapped(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The mask says who does not go."""
    weights, ids = scores.softmax(-1).max(-1)
    mask, out = within(F.one_hot(ids, EXPERTS)), torch.zeros_like(x)
    for e in range(EXPERTS):
        token = torch.where(1 - mask[:, e])[0]
        out = out.index_add(0, token, expert(x[token], up, down, e) * weights[token, None])
    return out


@pytest.mark.parametrize("block", [passed_on, counted, swapped], ids=lambda block: block.__name__)
def test_refuses_look_alikes(block: Block) -> None:
    unit = unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS), **weights())
    assert_refused(RaiseExperts(), ExpertLoop(), unit, ".+")

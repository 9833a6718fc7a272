from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.passes import RaiseExperts
from moe_compile.patterns import ExpertLoop
from tests.patterns.harness import SEQUENCE, assert_refused, normal, unit_of
from tests.patterns.idioms import EXPERTS, swiglu

LIMIT = 64
"""More than the tokens of any proof."""

Chosen = Callable[[Tensor, int], Tensor]


def first_rows(ids: Tensor, expert: int) -> Tensor:
    return torch.where(ids == expert)[0][:LIMIT]


def by_place(ids: Tensor, expert: int) -> Tensor:
    own = ids == expert
    return torch.where(own & (own.cumsum(0) <= LIMIT))[0]


def by_room(ids: Tensor, expert: int) -> Tensor:
    """The constant is added, the comparison is with zero."""
    own = ids == expert
    return torch.where(own & (LIMIT - own.cumsum(0) >= 0))[0]


def by_rounds(ids: Tensor, expert: int) -> Tensor:
    own = ids == expert
    return torch.where(own & ((own.cumsum(0) - 1) // LIMIT == 0))[0]


def by_tensor(ids: Tensor, expert: int) -> Tensor:
    own = ids == expert
    return torch.where(own & (own.cumsum(0) <= torch.full_like(ids[:1], LIMIT)))[0]


def by_size(ids: Tensor, expert: int) -> Tensor:
    """Of few tokens, hardly ever too many have one expert."""
    own = ids == expert
    return torch.where(own & (own.cumsum(0) < ids.shape[0]))[0]


def of_the_first_tokens(ids: Tensor, expert: int) -> Tensor:
    return torch.where((ids == expert) & (torch.arange(ids.shape[0]) < LIMIT))[0]


LIMITED = [first_rows, by_place, by_room, by_rounds, by_tensor, by_size, of_the_first_tokens]


@pytest.mark.parametrize("chosen", LIMITED, ids=lambda f: f.__name__)
def test_refuses_what_only_many_tokens_would_disprove(chosen: Chosen) -> None:
    def block(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, ids = scores.softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token = chosen(ids, expert)
            rows = F.linear(swiglu(F.linear(x[token], up[expert])), down[expert])
            out = out.index_add(0, token, rows * weights[token, None])
        return out

    weights = {"up": normal(EXPERTS, 12, 8), "down": normal(EXPERTS, 8, 6)}
    unit = unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS), **weights)
    reason = "tokens beyond a limit of .* go another way"
    assert_refused(RaiseExperts(), ExpertLoop(), unit, reason)


def test_a_branch_on_how_many_rows_an_expert_has_is_not_traced() -> None:
    def block(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, ids = scores.softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token = torch.where(ids == expert)[0]
            if token.shape[0] > LIMIT:
                token = token.flip(0)
            rows = F.linear(swiglu(F.linear(x[token], up[expert])), down[expert])
            out = out.index_add(0, token, rows * weights[token, None])
        return out

    weights = {"up": normal(EXPERTS, 12, 8), "down": normal(EXPERTS, 8, 6)}
    with pytest.raises(Exception, match="data-dependent"):
        unit_of(block, normal(SEQUENCE, 8), normal(SEQUENCE, EXPERTS), **weights)

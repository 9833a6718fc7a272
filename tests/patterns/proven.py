"""Patterns of experts whose routing is proven: `before` is raised, and equals `after`."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.passes import RaiseExperts
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.verify.parity import prove
from tests.patterns.harness import canonical_node, normal, unit_of

Choice = dict[str, bool]

CHOICES: list[Choice] = [
    {"transposed": transposed, "weigh_input": weigh_input, "full": full, "identity": False}
    for transposed, weigh_input, full in itertools.product((False, True), repeat=3)
]
TOKENS, EXPERTS, PICKS, HIDDEN, WIDTH = 5, 4, 2, 8, 6


def stacks(choice: Choice) -> dict[str, Tensor]:
    """Experts' weights, as they are stored."""
    up, down = normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH)
    if choice["transposed"]:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    return {"up": up, "down": down}


def squared(rows: Tensor) -> Tensor:
    """An activation that is zero at zero."""
    return F.relu(rows) * rows


def assert_raised_by(pattern: ProvenExperts, choice: Choice) -> None:
    """`before`, behind a router, becomes the canonical op."""

    def block(x: Tensor, scores: Tensor, **weights: Tensor) -> Tensor:
        picked, ids = scores.topk(PICKS, dim=-1)
        own = scores if choice["full"] else picked
        fixed: Any = {"activation": squared, "up_bias": None, "down_bias": None} | choice
        return pattern.before(x, ids, own, **weights, **fixed)

    unit = unit_of(block, normal(TOKENS, HIDDEN), normal(TOKENS, EXPERTS), **stacks(choice))
    assert RaiseExperts().run(unit) == 1, unit.near_misses[pattern.name].reason
    assert canonical_node(unit).meta["made_by"][1] == pattern.name


def assert_same_sum(pattern: ProvenExperts, choice: Choice) -> None:
    """`before` and `after` are one function over a prime field.

    Ids beyond the experts add nothing, or are the identity.
    """
    ids = torch.tensor([[0, 3], [2, 1], [3, 0], [1, 2], [0, 1]])
    for beyond, identity in ((False, False), (True, False), (True, True)):
        fixed: Any = choice | {"identity": identity, "activation": squared}
        own = ids + beyond * (ids == 3)  # 4 is beyond the last expert
        weights = normal(TOKENS, EXPERTS + 1 if choice["full"] else PICKS, dtype=torch.float64)
        values = [t.double() for t in stacks(choice).values()]
        biases = [normal(EXPERTS, WIDTH), normal(EXPERTS, HIDDEN)]
        inputs = [normal(TOKENS, HIDDEN), weights, *values, *biases]

        if choice["weigh_input"]:
            inputs = inputs[:-2]
            fixed |= {"up_bias": None, "down_bias": None}
        before = _over_tensors(pattern.before, own, fixed)
        after = _over_tensors(pattern.after, own, fixed | {"beyond": beyond})
        prove(before, after, [t.double() for t in inputs])


def _over_tensors(spelling: Any, ids: Tensor, fixed: Any) -> Any:
    def call(x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        named = dict(zip(("up", "down", "up_bias", "down_bias"), rest, strict=False))
        return spelling(x, ids, weights, **named, **fixed)

    return call

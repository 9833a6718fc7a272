from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moe_compile.rewrite.anchors import (
    is_attention,
    is_fused_norm,
    is_norm,
    is_selection,
    selects_positions,
)
from tests.patterns.harness import BATCH, SEQUENCE, Function, calls, normal, unit_of
from tests.patterns.idioms import narrow_norm, power_norm, rms_norm

Anchor = Callable[[fx.Node], bool]


def by_root(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True).clamp(min=1e-6)).sqrt()


def over_the_sequence(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


def another_power(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.25)


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (8,), weight)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), weight)


def count(anchor: Anchor, function: Function, *parameters: str) -> int:
    weights = {name: normal(8) for name in parameters}
    unit = unit_of(function, normal(BATCH, SEQUENCE, 8), **weights)
    return sum(map(anchor, calls(unit.graph)))


@pytest.mark.parametrize("function", [rms_norm, power_norm, narrow_norm, by_root])
def test_norms(function: Function) -> None:
    assert count(is_norm, function, "weight") == 1


@pytest.mark.parametrize("function", [over_the_sequence, another_power, fused, layer_norm])
def test_what_is_no_norm(function: Function) -> None:
    assert count(is_norm, function, "weight") == 0


def test_a_fused_norm() -> None:
    assert count(is_fused_norm, fused, "weight") == 1
    assert count(is_fused_norm, layer_norm, "weight") == 0


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def eager(x: Tensor) -> Tensor:
    return F.dropout((x @ x.mT).softmax(-1).to(x.dtype), 0.1) @ x


def gating(x: Tensor) -> Tensor:
    return x * x.softmax(-1)


def over_queries(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(1) @ x


@pytest.mark.parametrize(
    ("function", "found"), [(sdpa, 1), (eager, 1), (gating, 0), (over_queries, 0)]
)
def test_attention(function: Function, found: int) -> None:
    assert count(is_attention, function) == found


def of_experts(x: Tensor) -> Tensor:
    return x.topk(2).indices


def of_positions(x: Tensor) -> Tensor:
    return (x @ x.mT).topk(2, dim=-1).indices


def argmax_of_positions(x: Tensor) -> Tensor:
    return x.argmax(1)


def maximum(x: Tensor) -> Tensor:
    return x.max(-1).values


@pytest.mark.parametrize(
    ("function", "found"),
    [(of_experts, [False]), (of_positions, [True]), (argmax_of_positions, [True]), (maximum, [])],
)
def test_selections(function: Function, found: list[bool]) -> None:
    nodes = calls(unit_of(function, normal(BATCH, SEQUENCE, 8)).graph)
    assert [selects_positions(node) for node in nodes if is_selection(node)] == found

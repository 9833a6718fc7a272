import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.kernels.grouped_mm import grouped_mm
from moe_compile.passes import RaiseExperts
from moe_compile.patterns import GroupedExperts
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    SEQUENCE,
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    calls,
    canonical_node,
    normal,
    spelling,
    unit_of,
)
from tests.patterns.idioms import EXPERTS, expert_ids, experts_unit, grouped_experts, swiglu

SPELLINGS = templates(GroupedExperts())


def plain(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    dim: int = 1,
    bins: int = EXPERTS,
) -> Tensor:
    """Without sentinels, stored as [in, out]; operands swapped, casts that do nothing."""
    expert, order = ids.flatten().sort()
    rows = x.contiguous()[torch.div(order, ids.shape[1], rounding_mode="floor")]
    counts = torch.histc(expert.float(), bins=bins, min=0, max=EXPERTS - 1)
    offs = counts.cumsum(0, dtype=torch.int32)
    rows = grouped_mm(swiglu(grouped_mm(rows, up.to(x.dtype), offs)), down, offs)
    rows = torch.multiply(weights.flatten()[order][:, None], rows)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    rows = rows[inverse].reshape(x.shape[0], ids.shape[1], -1)
    return rows.sum(dim=dim)


def biased(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
) -> Tensor:
    expert, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(expert.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = F.grouped_mm(x[order // ids.size(-1)], up.transpose(-2, -1), offs=offs)
    rows.add_(up_bias[expert])
    rows = F.grouped_mm(swiglu(rows), down.transpose(-2, -1), offs=offs)
    rows.add_(down_bias[expert])
    rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0))
    return rows[inverse].view(x.size(0), ids.size(-1), rows.size(-1)).sum(dim=1)


def stored_transposed(function: Function) -> Function:
    """The weights as views of the other layout, which makes no difference to the idiom."""

    def call(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return function(x, ids, weights, up.transpose(1, 2), down.transpose(1, 2))

    return call


@pytest.mark.parametrize("function", [grouped_experts, stored_transposed(plain)])
def test_rewrites(function: Function) -> None:
    unit = experts_unit(function)
    assert_raised(RaiseExperts(), unit, ["experts"])
    node = canonical_node(unit)
    given = {name: value for name, value in node.kwargs.items() if value is not None}
    assert given == {"transposed": False, "weigh_input": False}
    assert [str(n.target) for n in node.all_input_nodes[-2:]] == ["up", "down"]


def test_rewrites_experts_with_biases() -> None:
    biases = {"up_bias": normal(EXPERTS, 12), "down_bias": normal(EXPERTS, 8)}
    assert_raised(RaiseExperts(), experts_unit(biased, **biases), ["experts"])


def over_tokens(rows: Tensor) -> Tensor:
    return swiglu(rows.softmax(0))


def summed(rows: Tensor) -> Tensor:
    return swiglu(rows + rows.sum(0, keepdim=True))


def computed(name: str) -> Function:
    def call(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        up, down = (up * 2, down) if name == "up" else (up, down * 2)
        return grouped_experts(x, ids, weights, up, down)

    return call


def sorted_used_outside(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []

    def activation(rows: Tensor) -> Tensor:
        seen.append(swiglu(rows))
        return seen[0]

    out = grouped_experts(x, ids, weights, up, down, activation)
    return out, seen[0].sin()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (computed("up"), "the up weight is computed, not a parameter"),
        (computed("down"), "the down weight is computed, not a parameter"),
        (
            functools.partial(grouped_experts, activation=over_tokens),
            "aten.softmax.int in the activation may mix tokens",
        ),
        (
            functools.partial(grouped_experts, activation=summed),
            "aten.sum.dim_IntList in the activation may mix tokens",
        ),
        (sorted_used_outside, "the inner value mul.* is used by sin outside the idiom"),
        (stored_transposed(functools.partial(plain, dim=0)), "expected dim=1, found 0"),
        (stored_transposed(functools.partial(plain, bins=5)), "expected bins=4, found 5"),
    ],
)
def test_refuses(function: Function, reason: str) -> None:
    assert_refused(RaiseExperts(), GroupedExperts(), experts_unit(function), reason)


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, ids=expert_ids(6), activation=F.silu)


def test_a_sum_in_another_dtype_stays_in_it() -> None:
    """The op's result is in the rows' dtype; float32 weights made the original's float32."""
    x, weights = normal(SEQUENCE, 8, dtype=torch.bfloat16), normal(SEQUENCE, 2)
    stacks = {"up": normal(EXPERTS, 8, 12), "down": normal(EXPERTS, 6, 8)}
    narrow = {name: stack.bfloat16() for name, stack in stacks.items()}
    unit = unit_of(plain, x, expert_ids(), weights, **narrow)
    assert calls(unit.graph)[-1].meta["val"].dtype == torch.float32
    assert RaiseExperts().run(unit) == 1
    assert calls(unit.graph)[-1].meta["val"].dtype == torch.float32

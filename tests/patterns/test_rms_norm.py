from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.passes import RaiseNorms
from moe_compile.patterns import RMSNorm
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    assert_same_bits,
    canonical_node,
    normal,
    spelling,
    unit_of,
)
from tests.patterns.idioms import EPS, norm_unit, rms_norm

SPELLINGS = templates(RMSNorm())
DTYPES = [torch.float32, torch.bfloat16]


def wide_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)


def cast_last(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * wide_norm(x)).to(x.dtype)


def one_plus(x: Tensor, weight: Tensor) -> Tensor:
    return (wide_norm(x) * (1.0 + weight.float())).type_as(x)


def without_weight(x: Tensor) -> Tensor:
    return wide_norm(x).to(x.dtype)


def respelled(x: Tensor, weight: Tensor) -> Tensor:
    """Operands swapped, casts and reshapes that do nothing."""
    wide = x.to(torch.float32).view(x.shape).to(torch.float32)
    mean = (EPS + torch.mean(torch.square(wide), dim=[-1], keepdim=True)).contiguous()
    return (torch.rsqrt(mean) * wide).reshape(x.shape).to(x.dtype).to(x.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [rms_norm, cast_last, one_plus, respelled])
def test_rewrites(function: Function, dtype: torch.dtype) -> None:
    unit = norm_unit(function, dtype)
    assert_raised(RaiseNorms(), unit, ["rms_norm"])
    assert canonical_node(unit).args[2] == EPS


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewrites_a_norm_without_a_weight(dtype: torch.dtype) -> None:
    unit = unit_of(without_weight, normal(BATCH, SEQUENCE, 8, dtype=dtype))
    assert_raised(RaiseNorms(), unit, ["rms_norm"])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (rms_norm, {"cast_first": True, "offset": 0.0}),
        (cast_last, {"cast_first": False, "offset": 0.0}),
        (one_plus, {"cast_first": False, "offset": 1.0}),
    ],
)
def test_keeps_the_order_of_roundings(function: Function, options: dict[str, Any]) -> None:
    unit = norm_unit(function)
    assert RaiseNorms().run(unit) == 1
    assert canonical_node(unit).kwargs == options


def test_the_weight_may_be_computed() -> None:
    def two_plus(x: Tensor, weight: Tensor) -> Tensor:
        return (wide_norm(x) * (2.0 + weight.float())).type_as(x)

    assert_raised(RaiseNorms(), norm_unit(two_plus), ["to", "add", "rms_norm"])


def eps_outside_the_root(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) + EPS
    return weight * (wide * root).to(x.dtype)


def over_the_wrong_dimension(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + EPS)).to(x.dtype)


def cubed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def learned_eps(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean + weight[:1])).to(x.dtype)


def root_used_outside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (wide * root).to(x.dtype), root.sin()


def mean_of_another_value(x: Tensor, weight: Tensor) -> Tensor:
    wide, other = x.float(), x.float().sin()
    return weight * (wide * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def another_weight_for_every_row(x: Tensor, weight: Tensor) -> Tensor:
    wide, rows = x.float(), weight.expand(x.shape[1], 8)
    return rows.sin() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def one_weight_for_all(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight[:1] * normed.to(x.dtype)


@pytest.mark.parametrize("function", [another_weight_for_every_row, one_weight_for_all])
def test_a_weight_of_another_shape_stays_outside(function: Function) -> None:
    """The norm without a weight is what is left."""
    unit = norm_unit(function)
    RaiseNorms().run(unit)
    assert canonical_node(unit).args[1] is None
    found = unit.near_misses[RMSNorm().name].reason
    assert "is no vector of the normalised size" in found


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (eps_outside_the_root, "expected aten.rsqrt.default, found aten.add.Tensor"),
        (over_the_wrong_dimension, "expected dim=2, found 1"),
        (cubed, "expected exponent=2, found 3"),
        (learned_eps, "a computed value where a literal is expected"),
        (root_used_outside, "the inner value rsqrt is used by sin outside the idiom"),
        (mean_of_another_value, "another value"),
    ],
)
def test_refuses(function: Function, reason: str) -> None:
    assert_refused(RaiseNorms(), RMSNorm(), norm_unit(function), reason)


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_same_bits(template: Template, dtype: torch.dtype) -> None:
    assert_same_bits(template, dtype, eps=EPS)

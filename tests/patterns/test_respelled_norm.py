from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.passes import RaiseNorms
from moe_compile.patterns import RespelledNorm
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    canonical_node,
    normal,
    spelling,
    unit_of,
)
from tests.patterns.idioms import EPS, narrow_norm, norm_unit, power_norm

SPELLINGS = templates(RespelledNorm())
DTYPES = [torch.float32, torch.bfloat16]


def one_plus(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5)
    return (normed * (1.0 + weight.float())).type_as(x)


def without_weight(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5)).type_as(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [narrow_norm, one_plus])
def test_rewrites(function: Function, dtype: torch.dtype) -> None:
    unit = norm_unit(function, dtype)
    assert_raised(RaiseNorms(), unit, ["rms_norm"])
    assert canonical_node(unit).args[2] == EPS


def test_the_weight_may_be_upcast() -> None:
    assert_raised(RaiseNorms(), norm_unit(power_norm), ["to", "rms_norm"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewrites_a_norm_without_a_weight(dtype: torch.dtype) -> None:
    unit = unit_of(without_weight, normal(BATCH, SEQUENCE, 8, dtype=dtype))
    assert_raised(RaiseNorms(), unit, ["rms_norm"])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (narrow_norm, {"cast_first": True, "offset": 0.0}),
        (power_norm, {"cast_first": False, "offset": 0.0}),
        (one_plus, {"cast_first": False, "offset": 1.0}),
    ],
)
def test_keeps_the_order_of_roundings(function: Function, options: dict[str, Any]) -> None:
    unit = norm_unit(function)
    assert RaiseNorms().run(unit) == 1
    assert canonical_node(unit).kwargs == options


def another_power(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.25)).to(x.dtype)


def test_refuses() -> None:
    unit = norm_unit(another_power)
    assert_refused(RaiseNorms(), RespelledNorm(), unit, "expected the literal -0.5, found -0.25")


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, eps=EPS)

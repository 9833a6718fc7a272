import pytest
import torch
from torch import Tensor

from moe_compile.passes import RaiseRotary
from moe_compile.patterns import RotaryHalf
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    assert_same_bits,
    spelling,
)
from tests.patterns.idioms import rotary_half, rotary_unit, rotate_half

SPELLINGS = templates(RotaryHalf())


def respelled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Operands swapped, casts and reshapes that do nothing, other ways to take a half."""
    first, second = x.contiguous().split(4, dim=3)
    turned = torch.concat((torch.negative(second), first.to(x.dtype)), dim=3)
    return torch.multiply(sin, turned.view(x.shape)) + cos.reshape(cos.shape) * x


@pytest.mark.parametrize("function", [rotary_half, respelled])
def test_rewrites(function: Function) -> None:
    assert_raised(RaiseRotary(), rotary_unit(function), ["rotary"])


def test_rewrites_each_tensor_that_shares_the_angles() -> None:
    def queries_and_keys(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key = x.sin()
        return rotary_half(x, cos, sin), rotary_half(key, cos, sin)

    assert_raised(RaiseRotary(), rotary_unit(queries_and_keys), ["sin", "rotary", "rotary"])


def wrong_half_negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def halves_in_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-first, second), dim=-1) * sin


def along_the_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return x * cos + torch.cat((-second, first), dim=1) * sin


def quarters(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin


def half_of_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x.sin()) * sin


def turned_used_outside(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = rotate_half(x)
    return x * cos + turned * sin, turned.sin()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong_half_negated, "expected aten.neg.default, found aten.slice.Tensor"),
        (halves_in_order, "expected start=4, found 0"),
        (along_the_heads, "expected dim=3, found 1"),
        (quarters, "expected start=4, found 2"),
        (half_of_another, "another value"),
        (turned_used_outside, "the inner value cat.* is used by sin outside the idiom"),
    ],
)
def test_refuses(function: Function, reason: str) -> None:
    assert_refused(RaiseRotary(), RotaryHalf(), rotary_unit(function), reason)


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_same_bits(template: Template, dtype: torch.dtype) -> None:
    assert_same_bits(template, dtype)

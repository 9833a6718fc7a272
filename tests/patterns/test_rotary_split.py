import pytest
import torch
from torch import Tensor

from moe_compile.passes import RaiseRotary
from moe_compile.patterns import RotarySplit
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    assert_same_bits,
    canonical_node,
    spelling,
)
from tests.patterns.idioms import rotary_split, rotary_unit

SPELLINGS = templates(RotarySplit())


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def respelled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Operands swapped, casts and reshapes that do nothing, other ways to take a half."""
    first, second = x[..., :4].to(x.dtype), x.reshape(x.shape)[:, :, :, 4:]
    left = torch.subtract(cos * first, second * sin.contiguous())
    return torch.concat([left.view(left.shape), sin * first + cos * second], dim=3)


@pytest.mark.parametrize(
    ("function", "pairs"), [(rotary_split, False), (respelled, False), (interleaved, True)]
)
def test_rewrites(function: Function, pairs: bool) -> None:
    unit = rotary_unit(function, width=4)
    assert_raised(RaiseRotary(), unit, ["rotary"])
    assert canonical_node(unit).kwargs == {"interleaved": pairs}


def turned_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def mirrored(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + second * sin), dim=-1)


def along_the_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def product_used_outside(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    left = first * cos - second * sin
    return torch.cat((left, second * cos + first * sin), dim=-1), left.sin()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (turned_backwards, "expected aten.sub.Tensor, found aten.add.Tensor"),
        (mirrored, "another value"),
        (along_the_heads, "expected dim=3, found 1"),
        (product_used_outside, "the inner value sub.* is used by sin outside the idiom"),
    ],
)
def test_refuses(function: Function, reason: str) -> None:
    assert_refused(RaiseRotary(), RotarySplit(), rotary_unit(function, width=4), reason)


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_same_bits(template: Template, dtype: torch.dtype) -> None:
    assert_same_bits(template, dtype)

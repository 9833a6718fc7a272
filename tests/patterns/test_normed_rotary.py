import pytest
import torch
from torch import Tensor

from moe_compile.ops import rms_norm, rotary
from moe_compile.passes import RaiseNorms, RaiseRotary
from moe_compile.patterns import NormedRotary
from moe_compile.rewrite.pattern import Match, Template, templates
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns import idioms
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    assert_same_algebra,
    assert_same_bits,
    normal,
    spelling,
    unit_of,
)

HEADS, WIDTH = 4, 8
FORMS = {"offset": 0.5, "eps": idioms.EPS}
SPELLINGS = templates(NormedRotary())


def query(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    normed = idioms.rms_norm(x, weight).transpose(1, 2)
    return idioms.rotary_half(normed, cos, sin)


def in_place_of_it(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    return idioms.rotary_half(idioms.power_norm(x.transpose(1, 2), weight), cos, sin)


def normed_used_outside(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    normed = idioms.rms_norm(x, weight).transpose(1, 2)
    return idioms.rotary_half(normed, cos, sin), normed.sin()


def part_of_a_head(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    normed = idioms.rms_norm(x, weight).transpose(1, 2)
    angles = cos[..., : WIDTH // 2], sin[..., : WIDTH // 2]
    turned = idioms.rotary_half(normed[..., : WIDTH // 2], *angles)
    return torch.cat((turned, normed[..., WIDTH // 2 :]), dim=-1)


def across_the_heads(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    angles = (t.transpose(1, 2)[..., :HEADS] for t in (cos, sin))
    return idioms.rotary_half(idioms.rms_norm(x, weight).transpose(2, 3), *angles)


def raised_unit(function: Function) -> UnitGraph:
    x = normal(BATCH, SEQUENCE, HEADS, WIDTH)
    cos, sin = (normal(BATCH, 1, SEQUENCE, WIDTH) for _ in range(2))
    unit = unit_of(function, x, cos, sin, weight=normal(WIDTH))
    for step in (RaiseNorms(), RaiseRotary()):
        step.run(unit)
    return unit


def matches(unit: UnitGraph) -> list[Match]:
    return list(NormedRotary().find(unit.graph))


@pytest.mark.parametrize(("function", "swapped"), [(query, True), (in_place_of_it, False)])
def test_finds_both_ops(function: Function, swapped: bool) -> None:
    (match,) = matches(raised_unit(function))
    assert match.root.target is rotary
    assert rms_norm in {node.target for node in match.nodes}
    assert match.choice["swapped"] is swapped
    assert match.bindings["eps"] == idioms.EPS
    assert match.bindings["offset"] == 0.0


@pytest.mark.parametrize("function", [normed_used_outside, part_of_a_head, across_the_heads])
def test_leaves_what_is_more_than_both_ops(function: Function) -> None:
    unit = raised_unit(function)
    assert "rms_norm" in unit.ops()
    assert matches(unit) == []


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, **FORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_same_bits(template: Template, dtype: torch.dtype) -> None:
    assert_same_bits(template, dtype, **FORMS)

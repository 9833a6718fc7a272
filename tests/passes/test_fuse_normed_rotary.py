from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moe_compile.ops import CanonicalOp, normed_rotary
from moe_compile.passes import ChooseProviders, FuseNormedRotary, Lower
from moe_compile.passes.facts import LOWERED, NORMALIZED, NORMED_ROTARY_FUSED, PLANNED
from moe_compile.providers import registry
from moe_compile.providers.formula import FormulaProvider
from moe_compile.providers.provider import Call
from moe_compile.rewrite.refuse import Refuse
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    canonical_node,
    evaluate,
    normal,
    op_names,
)
from tests.patterns.test_normed_rotary import (
    HEADS,
    WIDTH,
    in_place_of_it,
    normed_used_outside,
    query,
    raised_unit,
)


@dataclass(frozen=True)
class Kernel(FormulaProvider):
    """Takes the op on every device."""

    name: str = "kernel"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        return None if op is normed_rotary else Refuse("another op")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PROVIDERS", (*registry.PROVIDERS, Kernel()))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("function", [query, in_place_of_it])
def test_fuses(function: Function) -> None:
    unit = raised_unit(function)
    assert FuseNormedRotary().run(unit) == 1
    assert op_names(unit) == ["transpose", "normed_rotary"]
    assert FuseNormedRotary().run(unit) == 0


@pytest.mark.usefixtures("kernel")
def test_gives_its_fact() -> None:
    unit = raised_unit(query)
    assert not NORMED_ROTARY_FUSED.holds(unit.graph)
    FuseNormedRotary().run(unit)
    assert NORMED_ROTARY_FUSED.holds(unit.graph)
    assert NORMALIZED.holds(unit.graph)
    assert FuseNormedRotary.breaks == {LOWERED, PLANNED}
    assert canonical_node(unit).meta["made_by"] == ("fuse_normed_rotary", "normed_rotary")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("function", [query, in_place_of_it])
def test_computes_the_same(function: Function) -> None:
    unit = raised_unit(function)
    inputs = [normal(BATCH, SEQUENCE, HEADS, WIDTH), *[normal(BATCH, 1, SEQUENCE, WIDTH)] * 2]
    state = {"weight": normal(WIDTH)}
    (want,) = evaluate(unit.graph, inputs, state)
    for step in (FuseNormedRotary(), ChooseProviders(), Lower()):
        assert step.run(unit) == 1
        (got,) = evaluate(unit.graph, inputs, state)
        assert torch.equal(got, want)


@pytest.mark.usefixtures("kernel")
def test_leaves_what_is_used_in_between() -> None:
    unit = raised_unit(normed_used_outside)
    assert FuseNormedRotary().run(unit) == 0
    assert NORMED_ROTARY_FUSED.holds(unit.graph)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("op", ["rms_norm", "rotary"])
def test_leaves_ops_for_which_a_provider_was_asked(op: str) -> None:
    unit = raised_unit(query)
    unit.wanted_providers = {op: "torch"}
    assert FuseNormedRotary().run(unit) == 0
    assert NORMED_ROTARY_FUSED.holds(unit.graph)


def test_leaves_two_ops_where_there_is_no_kernel() -> None:
    unit = raised_unit(query)
    assert FuseNormedRotary().run(unit) == 0
    assert unit.ops() == {"rms_norm": 1, "rotary": 1}
    assert NORMED_ROTARY_FUSED.holds(unit.graph)

import sys

import pytest

from moe_compile.ops import JOURNEYS
from moe_compile.passes import (
    ChooseProviders,
    ChunkTokens,
    DispatchExperts,
    RaiseExperts,
    RaiseNorms,
)
from moe_compile.passes.facts import NORMALIZED, PLANNED
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph
from tests import deep_ep_emulator
from tests.passes.test_dispatch_experts import TWO
from tests.patterns.harness import canonical_node
from tests.patterns.idioms import experts_unit, norm_unit


def raised_unit() -> UnitGraph:
    unit = norm_unit()
    assert RaiseNorms().run(unit) == 1
    return unit


def test_gives_its_fact_and_changes_no_operation() -> None:
    unit = raised_unit()
    before = str(unit.graph)
    assert not PLANNED.holds(unit.graph)
    assert ChooseProviders().run(unit) == 1
    assert PLANNED.holds(unit.graph)
    assert str(unit.graph) == before
    assert ChooseProviders.needs == {NORMALIZED}
    assert ChooseProviders.gives == {PLANNED}


def test_notes_the_provider_and_its_implementation() -> None:
    unit = raised_unit()
    ChooseProviders().run(unit)
    meta = canonical_node(unit).meta
    assert meta["provider"] == "torch"
    assert callable(meta["implementation"])
    assert "keeps" in meta


def test_refuses_a_provider_that_does_not_exist() -> None:
    unit = raised_unit()
    unit.wanted_providers = {"rms_norm": "elsewhere"}
    with pytest.raises(ValueError, match="no provider is called 'elsewhere'"):
        ChooseProviders().run(unit)


def test_a_wanted_provider_that_refuses_is_an_error() -> None:
    unit = raised_unit()
    unit.wanted_providers = {"rms_norm": "all_to_all"}
    with pytest.raises(ValueError, match="got 'all_to_all' for 'rms_norm', which refuses a call"):
        ChooseProviders().run(unit)


@pytest.mark.parametrize("more", [(), (ChunkTokens(2),)], ids=["whole", "chunks"])
def test_who_was_asked_to_send_tokens_brings_them_back(
    monkeypatch: pytest.MonkeyPatch, more: tuple[Pass, ...]
) -> None:
    """DeepEP is there, and would take any combine."""
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_emulator)
    unit = experts_unit()
    unit.ep, unit.wanted_providers = TWO, {"dispatch": "all_to_all"}
    for step in (RaiseExperts(), DispatchExperts(), *more, ChooseProviders()):
        step.run(unit)
    travels = [n for n in unit.graph.nodes if n.target in JOURNEYS]
    assert len(travels) >= 2
    assert {node.meta["provider"] for node in travels} == {"all_to_all"}

import torch

from moe_compile.capture.trace import Mode
from moe_compile.passes import PIPELINE, Normalize, RaiseMLPs
from moe_compile.passes.facts import LOWERED, MLPS_RAISED, NORMALIZED, PLANNED
from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.pipeline import Pass, verify_facts
from tests.patterns.harness import BATCH, SEQUENCE, Idiom, capture, normal
from tests.patterns.idioms import gated_mlp, norm_unit

WEIGHTS = {"gate": normal(6, 8), "up": normal(6, 8), "down": normal(8, 6)}


def test_every_fact_of_the_default_order_holds_at_its_pass() -> None:
    unit = norm_unit()
    for step in PIPELINE:
        step.run(unit)
        verify_facts(step, unit.graph)
    assert {f.name for f in (NORMALIZED, PLANNED, LOWERED)} <= facts_of(*PIPELINE)


def facts_of(*steps: Pass) -> set[str]:
    return {fact.name for step in steps for fact in step.gives}


def test_each_fact_is_given_by_one_pass() -> None:
    given = [fact for step in PIPELINE for fact in step.gives]
    assert len(given) == len(set(given))
    assert all(step.gives for step in PIPELINE)


def test_facts_are_compared_by_name_and_printed_so() -> None:
    assert Fact("one", lambda _: True) == Fact("one", lambda _: False)
    assert Fact("one", lambda _: True) != Fact("two", lambda _: True)
    assert str(NORMALIZED) == "normalized"


def test_a_raised_fact_does_not_hold_before_its_pass_under_autocast() -> None:
    mode = Mode(autocast=torch.bfloat16)
    unit = capture(Idiom(gated_mlp, WEIGHTS), normal(BATCH, SEQUENCE, 8), mode=mode)
    Normalize().run(unit)
    assert not MLPS_RAISED.holds(unit.graph)
    assert RaiseMLPs().run(unit) == 1
    assert MLPS_RAISED.holds(unit.graph)

from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
from torch import fx

from moe_compile.passes import PIPELINE, ChooseProviders, Lower, Normalize, RaiseNorms
from moe_compile.passes.facts import LOWERED
from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.pipeline import Pass, Pipeline, verify_facts
from moe_compile.rewrite.unit_graph import UnitGraph

NAMES = PIPELINE.names()
SMALL = Pipeline((Normalize(), RaiseNorms(), ChooseProviders(), Lower()), frozenset({LOWERED}))
LIE = Fact("a lie", lambda _: False)


@dataclass(frozen=True)
class Nothing(Pass):
    """Changes nothing."""

    name = "nothing"

    def run(self, unit: UnitGraph) -> int:
        return 0


@dataclass(frozen=True)
class Liar(Nothing):
    """Gives a fact that never holds."""

    name = "liar"
    gives = frozenset({LIE})


@dataclass(frozen=True)
class Believer(Nothing):
    """Needs the fact that never holds."""

    name = "believer"
    needs = frozenset({LIE})


@dataclass(frozen=True)
class Breaker(Nothing):
    """Breaks it."""

    name = "breaker"
    breaks = frozenset({LIE})


def test_without_leaves_passes_out() -> None:
    assert PIPELINE.without("raise_norms", "raise_mlps").names() == [
        name for name in NAMES if name not in ("raise_norms", "raise_mlps")
    ]


def test_before_after_and_replace_put_passes_in_their_place() -> None:
    names = SMALL.names()
    assert SMALL.before("raise_norms", Nothing()).names() == [names[0], "nothing", *names[1:]]
    assert SMALL.after("raise_norms", Nothing()).names() == [*names[:2], "nothing", *names[2:]]
    assert SMALL.replace("raise_norms", Nothing()).names() == [names[0], "nothing", *names[2:]]


def test_before_and_after_keep_the_order_of_several_passes() -> None:
    for order in (
        SMALL.before("lower", Liar(), Nothing()),
        SMALL.after("lower", Liar(), Nothing()),
    ):
        assert [name for name in order.names() if name in ("liar", "nothing")] == [
            "liar",
            "nothing",
        ]


def test_an_order_keeps_what_it_needs_at_its_end() -> None:
    for order in (SMALL.without("raise_norms"), SMALL.after("lower", Nothing())):
        assert order.needs_at_end == {LOWERED}


def test_a_pipeline_is_not_changed() -> None:
    PIPELINE.without("raise_norms").after("normalize", Nothing())
    assert PIPELINE.names() == NAMES
    order: Any = PIPELINE
    with pytest.raises(FrozenInstanceError):
        order.passes = ()


def test_a_pipeline_is_a_sequence_of_its_passes() -> None:
    assert [step.name for step in PIPELINE] == NAMES
    assert len(PIPELINE) == len(NAMES) == 10
    assert PIPELINE["lower"] == Lower()
    assert Pipeline(SMALL.passes, SMALL.needs_at_end) == SMALL


@pytest.mark.parametrize("edit", ["without", "before", "after", "replace", "__getitem__"])
def test_an_unknown_pass_is_named_with_those_that_there_are(edit: str) -> None:
    arguments = [Nothing()] if edit == "replace" else []
    with pytest.raises(
        ValueError, match=r"^got 'fuse', which is no pass .* takes .* normalize, raise_"
    ):
        getattr(PIPELINE, edit)("fuse", *arguments)


def test_a_pass_stands_once() -> None:
    with pytest.raises(ValueError, match=r"has 'nothing' twice; give each pass its own name"):
        SMALL.before("lower", Nothing(), Nothing())


def test_a_missing_fact_is_named_with_the_pass_that_would_give_it() -> None:
    with pytest.raises(ValueError, match=r"'believer' needs .* 'a lie'.*put 'liar' before it"):
        Pipeline((Believer(), Liar()))
    with pytest.raises(ValueError, match=r"'raise_norms' needs .* 'normalized'.*no pass here"):
        PIPELINE.without("normalize", "raise_experts")


def test_a_fact_that_never_held_is_missing_and_not_broken() -> None:
    with pytest.raises(ValueError, match=r"'lower' needs .* 'planned'.*no pass here gives it"):
        PIPELINE.without("choose_providers")


def test_a_broken_fact_is_named_with_the_pass_that_broke_it() -> None:
    with pytest.raises(ValueError, match=r"'believer' needs .* 'a lie', which 'breaker' broke"):
        Pipeline((Liar(), Breaker(), Believer()))
    with pytest.raises(ValueError, match=r"'planned', which 'raise_norms' broke"):
        Pipeline((Normalize(), ChooseProviders(), RaiseNorms(), Lower()))


def test_a_broken_fact_may_be_given_again() -> None:
    @dataclass(frozen=True)
    class Again(Liar):
        name = "again"

    order = Pipeline((Liar(), Breaker(), Again(), Believer()))
    assert order.names() == ["liar", "breaker", "again", "believer"]


def test_what_is_needed_at_the_end_must_hold_there() -> None:
    with pytest.raises(ValueError, match=r"installing the result needs the fact 'lowered'"):
        PIPELINE.without("lower")
    with pytest.raises(ValueError, match=r"installing the result .* 'raise_norms' broke"):
        SMALL.without("raise_norms").after("lower", RaiseNorms())


def test_a_pass_that_does_not_give_its_fact_is_found_out() -> None:
    with pytest.raises(AssertionError, match=r"pass 'liar' does not give 'a lie'"):
        verify_facts(Liar(), fx.Graph())
    verify_facts(Nothing(), fx.Graph())


def test_a_pass_must_say_what_it_does() -> None:
    bare: Any = Pass()
    with pytest.raises(NotImplementedError):
        bare.run(None)


def test_passes_are_values() -> None:
    assert Nothing() == Nothing()
    assert Nothing() != Liar()
    assert Nothing.exact

import torch

from moe_compile.ops import rms_norm
from moe_compile.passes import ChooseProviders, Lower, RaiseNorms
from moe_compile.passes.facts import LOWERED, PLANNED
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.harness import BATCH, SEQUENCE, calls, canonical_node, evaluate, normal
from tests.patterns.idioms import norm_unit


def planned_unit() -> UnitGraph:
    unit = norm_unit(dtype=torch.float32)
    for step in (RaiseNorms(), ChooseProviders()):
        assert step.run(unit) == 1
    return unit


def test_gives_its_fact() -> None:
    unit = planned_unit()
    assert not LOWERED.holds(unit.graph)
    assert Lower().run(unit) == 1
    assert LOWERED.holds(unit.graph)
    assert Lower.needs == {PLANNED}
    assert Lower.gives == {LOWERED}
    assert Lower().run(unit) == 0


def test_puts_the_planned_implementation_in_place_and_keeps_the_notes() -> None:
    unit = planned_unit()
    meta = dict(canonical_node(unit).meta)
    Lower().run(unit)
    (node,) = calls(unit.graph)
    assert node.target is meta["implementation"]
    assert node.meta == meta | {"op": rms_norm}


def test_keeps_the_raised_graph() -> None:
    unit = planned_unit()
    before = str(unit.graph)
    Lower().run(unit)
    assert str(unit.raised) == before
    assert str(unit.graph) != before


def test_computes_what_the_raised_graph_computes() -> None:
    unit = planned_unit()
    Lower().run(unit)
    assert unit.raised is not None
    inputs, state = [normal(BATCH, SEQUENCE, 8)], {"weight": normal(8)}
    (want,), (got,) = (evaluate(graph, inputs, state) for graph in (unit.raised, unit.graph))
    torch.testing.assert_close(got, want)

from typing import Any

import pytest
from torch import fx

from moe_compile import ops
from moe_compile.install.forward import on_one_rank
from moe_compile.parallel.limits import limit_picks, limit_places
from moe_compile.passes import PIPELINE, ChunkTokens, DispatchExperts, LimitPicks
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.passes.test_dispatch_experts import TWO, raised_unit


def placed_unit() -> UnitGraph:
    unit = raised_unit(TWO)
    DispatchExperts().run(unit)
    return unit


def experts_of(unit: UnitGraph) -> fx.Node:
    (node,) = (n for n in unit.graph.nodes if n.target is ops.experts)
    return node


def test_experts_take_what_the_limit_gives() -> None:
    unit = placed_unit()
    before = dict(experts_of(unit).kwargs)
    assert LimitPicks(5).run(unit) == 1
    after = experts_of(unit).kwargs
    changed: dict[str, Any] = {n: v for n, v in after.items() if v is not before[n]}
    assert {n: node.target for n, node in changed.items()} == {
        "ids": limit_picks,
        "places": limit_places,
    }
    for name, node in changed.items():
        assert node.args == (before[name], 5)
        assert node.meta["made_by"] == ("limit_picks", "grouped_experts")
    assert after["ids"].meta["val"].shape == before["ids"].meta["val"].shape  # type: ignore[union-attr]


def test_one_rank_has_no_limit() -> None:
    unit = raised_unit(None)
    DispatchExperts().run(unit)
    assert LimitPicks(5).run(unit) == 0
    unit = placed_unit()
    LimitPicks(5).run(unit)
    for node in unit.graph.nodes:
        if node.target in ops.JOURNEYS:
            node.meta["op"] = node.target
    alone = on_one_rank(unit.graph, "alone")
    assert not {"limit_picks", "limit_places"} & set(alone.__code__.co_names)


@pytest.mark.parametrize("most", [0, True, 1.5])
def test_no_count(most: Any) -> None:
    with pytest.raises(ValueError, match=r"LimitPicks got most=.*; it takes a positive int: twice"):
        LimitPicks(most)


def test_the_order_of_passes() -> None:
    PIPELINE.after("dispatch_experts", ChunkTokens(), LimitPicks(5))
    with pytest.raises(ValueError, match="'dispatch_whole', which 'limit_picks' broke"):
        PIPELINE.after("dispatch_experts", LimitPicks(5), ChunkTokens())

from dataclasses import dataclass

import pytest
from torch import Tensor

from moe_compile import ops
from moe_compile.parallel.experts import scale_gradient
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.passes import PIPELINE, DispatchExperts, RaiseExperts
from moe_compile.passes.facts import EXPERTS_PLACED
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.idioms import experts_unit


@dataclass(frozen=True)
class Early(DispatchExperts):
    """The pass under another name, to stand in another place."""

    name = "early"


TWO = ExpertParallel("some group", size=2, data_ranks=6, one_machine=True, max_tokens=9)


def raised_unit(ep: ExpertParallel | None) -> UnitGraph:
    unit = experts_unit()
    unit.ep = ep
    assert RaiseExperts().run(unit) == 1
    return unit


def test_on_one_rank_nothing_changes() -> None:
    unit = raised_unit(None)
    before = str(unit.graph)
    assert not EXPERTS_PLACED.holds(unit.graph)
    assert DispatchExperts().run(unit) == 0
    assert EXPERTS_PLACED.holds(unit.graph)
    assert str(unit.graph) == before


def test_tokens_travel_to_the_experts_and_back() -> None:
    unit = raised_unit(TWO)
    (before,) = (n for n in unit.graph.nodes if n.target is ops.experts)
    x, ids, weights, up = before.args[:4]
    out = before.meta["val"]
    assert DispatchExperts().run(unit) == 1
    assert EXPERTS_PLACED.holds(unit.graph)
    assert unit.ops() == {"dispatch": 1, "experts": 1, "combine": 1}
    dispatch, experts, combine = (
        next(n for n in unit.graph.nodes if n.target is op)
        for op in (ops.dispatch, ops.experts, ops.combine)
    )
    count = up.meta["val"].shape[0]  # type: ignore[union-attr]
    assert dispatch.args[1:2] + dispatch.args[3:] == (ids, count, "some group", 9)
    sent = dispatch.args[0], dispatch.args[2]
    for scaled, given in zip(sent, (x, weights), strict=True):
        assert scaled.target is scale_gradient  # type: ignore[union-attr]
        assert scaled.args == (given, 6)  # type: ignore[union-attr]
    assert experts.kwargs["up"] is up
    assert experts.meta["data_ranks"] == 6
    assert combine.args[0] is experts
    assert combine.args[3] == "some group"
    (back,) = combine.users
    assert back.target is scale_gradient
    assert back.args == (combine, 1 / 6)
    assert isinstance(combine.meta["val"], Tensor)
    assert combine.meta["val"].shape == out.shape
    for node in (dispatch, experts, combine):
        assert node.meta["made_by"] == ("dispatch_experts", "grouped_experts")


def test_ranks_that_do_not_divide_the_experts() -> None:
    unit = raised_unit(ExpertParallel("some group", size=3, data_ranks=3, one_machine=True))
    with pytest.raises(ValueError, match=r"got 3 ranks for ep, and up has 4 experts; .*: 1, 2, 4"):
        DispatchExperts().run(unit)


def test_the_order_of_passes() -> None:
    with pytest.raises(ValueError, match="'experts_placed'"):
        PIPELINE.without("dispatch_experts")
    early = PIPELINE.before("raise_experts", Early())
    with pytest.raises(ValueError, match="'experts_placed', which 'raise_experts' broke"):
        early.without("dispatch_experts")

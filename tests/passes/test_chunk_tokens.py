import itertools

import pytest
import torch
from torch import fx

from moe_compile import ops
from moe_compile.passes import PIPELINE, ChunkTokens, DispatchExperts, OverlapSharedExperts
from moe_compile.passes.facts import DISPATCH_WHOLE, EXPERTS_PLACED, TOKENS_CHUNKED
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.passes.test_dispatch_experts import TWO, raised_unit


def placed_unit() -> UnitGraph:
    unit = raised_unit(TWO)
    DispatchExperts().run(unit)
    return unit


def journeys(unit: UnitGraph) -> list[fx.Node]:
    return [n for n in unit.graph.nodes if n.target in (*ops.JOURNEYS, ops.experts)]


def test_starts_and_waits_take_turns() -> None:
    unit = placed_unit()
    assert DISPATCH_WHOLE.holds(unit.graph)
    assert not TOKENS_CHUNKED.holds(unit.graph)
    assert ChunkTokens(3).run(unit) == 1
    assert TOKENS_CHUNKED.holds(unit.graph)
    assert EXPERTS_PLACED.holds(unit.graph)
    assert not DISPATCH_WHOLE.holds(unit.graph)
    start, wait, back, end = (
        ops.start_dispatch,
        ops.wait_dispatch,
        ops.start_combine,
        ops.wait_combine,
    )
    order = [(n.target, n.meta["chunk"]) for n in journeys(unit)]
    assert order == [
        *((start, 0), (start, 1), (wait, 0), (ops.experts, 0), (back, 0)),
        *((start, 2), (wait, 1), (ops.experts, 1), (back, 1)),
        *((wait, 2), (ops.experts, 2), (back, 2)),
        *((end, 0), (end, 1), (end, 2)),
    ]
    assert ChunkTokens(3).run(unit) == 0


def test_each_op_comes_after_the_one_before_it() -> None:
    unit = placed_unit()
    ChunkTokens(3).run(unit)
    chain = [n for n in journeys(unit) if n.target is not ops.experts]
    assert chain[0].args[-1] is None
    for before, node in itertools.pairwise(chain):
        done = node.args[-1]
        assert isinstance(done, fx.Node)
        assert done.args[0] is before


def test_a_chunk_has_its_share_of_the_bound_and_all_of_the_weights() -> None:
    unit = placed_unit()
    (whole,) = (n for n in unit.graph.nodes if n.target is ops.experts)
    up, out = whole.kwargs["up"], next(iter(whole.users)).meta["val"]
    ChunkTokens(2).run(unit)
    for node in journeys(unit):
        if node.target is ops.start_dispatch:
            assert node.args[4:6] == ("some group", 5)
        if node.target is ops.wait_dispatch:
            assert node.args[1:3] == ("some group", 5)
        if node.target is ops.experts:
            assert node.kwargs["up"] is up
            assert node.meta["data_ranks"] == 6
        assert node.meta["made_by"] == ("chunk_tokens", "grouped_experts")
    (joined,) = (n for n in unit.graph.nodes if n.target is torch.ops.aten.cat.default)
    assert joined.meta["val"].shape == out.shape


def test_without_other_ranks_nothing_changes() -> None:
    unit = raised_unit(None)
    DispatchExperts().run(unit)
    assert ChunkTokens().run(unit) == 0


def test_one_chunk() -> None:
    with pytest.raises(ValueError, match=r"got chunks=1; it takes a number from 2 on; leave"):
        ChunkTokens(1)


def test_the_order_of_passes() -> None:
    PIPELINE.after("dispatch_experts", ChunkTokens(), OverlapSharedExperts())
    with pytest.raises(ValueError, match="'dispatch_whole', which 'overlap_shared_experts' broke"):
        PIPELINE.after("dispatch_experts", OverlapSharedExperts(), ChunkTokens())
    with pytest.raises(ValueError, match="'chunk_tokens' needs the fact 'dispatch_whole'"):
        PIPELINE.before("dispatch_experts", ChunkTokens())
    with pytest.raises(ValueError, match="'planned', which 'chunk_tokens' broke"):
        PIPELINE.after("choose_providers", ChunkTokens())

"""Blocks of every kind, in a layer: what moves between a start and its wait, and what does not."""

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.install.cut import cut
from moe_compile.passes import (
    ChooseProviders,
    ChunkTokens,
    DispatchExperts,
    Lower,
    Normalize,
    OverlapSharedExperts,
    RaiseExperts,
)
from moe_compile.rewrite.journeys import schedule
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.passes.test_dispatch_experts import TWO
from tests.patterns.harness import SEQUENCE, capture, normal
from tests.patterns.idioms import EXPERTS, grouped_experts

SCHEDULE = "dispatch starts | {} | dispatch waits | experts | combine starts | combine waits"
NOTHING = "no module around its experts computes products that need none of its tokens"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(normal(EXPERTS, 12, 8))
        self.down = nn.Parameter(normal(EXPERTS, 8, 6))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_experts(x, ids, weights, self.up, self.down)


class Block(nn.Module):
    """A router, experts, and a shared one; how they are called is up to those below."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(8, EXPERTS), nn.Linear(8, 8)
        self.experts = Experts()

    def routed(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class SharedFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x).relu()
        return shared + self.routed(x)


class Own(Block):
    """Its product is in no module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + x @ self.shared.weight


class Behind(Block):
    """The shared expert sees what the experts made."""

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.routed(x))


class Ahead(Block):
    """The experts see what the shared one made."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(self.shared(x))


class Dropped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + F.dropout(self.shared(x), 0.5)


class Asks(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + (self.shared(x) if x.shape[0] > 1 else x)


class Layer(nn.Module):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        self.block, self.beside = kind(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.beside(x)


def placed_unit(kind: type[Block], *more: Pass) -> UnitGraph:
    unit = capture(Layer(kind), normal(SEQUENCE, 8))
    unit.ep = TWO
    for step in (Normalize(), RaiseExperts(), DispatchExperts(), *more):
        step.run(unit)
    return unit


def lowered(unit: UnitGraph) -> UnitGraph:
    ChooseProviders().run(unit)
    Lower().run(unit)
    return unit


@pytest.mark.parametrize(
    ("kind", "work"),
    [(Block, "shared"), (SharedFirst, "shared"), (Own, "aten.matmul.default")],
)
def test_work_moves_between_start_and_wait(kind: type[Block], work: str) -> None:
    unit = placed_unit(kind)
    assert OverlapSharedExperts().run(unit) == 1
    assert unit.not_overlapped == {}
    lowered(unit)
    unit.graph.lint()
    assert unit.owners().keys() == {"block"}
    assert schedule(unit, "block") == SCHEDULE.format(work)
    piece = cut(unit, unit.owners()["block"])
    assert piece.crossed == ("experts",)
    called = [n.target for n in piece.graph.nodes if n.op == "call_module"]
    assert sorted(called) == sorted({"router", "shared"} - ({"shared"} if kind is Own else set()))


def test_work_may_wait_for_the_way_back() -> None:
    unit = placed_unit(Block)
    assert OverlapSharedExperts("combine").run(unit) == 1
    steps = schedule(lowered(unit), "block")
    assert steps is not None
    assert steps.endswith("experts | combine starts | shared | combine waits")


def test_chunks_are_all_on_their_way() -> None:
    unit = placed_unit(Block, ChunkTokens(2))
    assert OverlapSharedExperts().run(unit) == 1
    steps = schedule(lowered(unit), "block")
    assert steps is not None
    assert steps.startswith("dispatch 0 starts | dispatch 1 starts | shared | dispatch 0 waits")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Behind, NOTHING),
        (Ahead, NOTHING),
        (Dropped, "the module around its experts draws random numbers, in an order that counts"),
        (Asks, "the module around its experts asks for sizes, so ranks could differ"),
    ],
)
def test_what_stays_as_it_is(kind: type[Block], reason: str) -> None:
    unit = placed_unit(kind)
    before = str(unit.graph)
    assert OverlapSharedExperts().run(unit) == 0
    assert str(unit.graph) == before
    assert unit.not_overlapped == {"block.experts": reason}
    assert schedule(lowered(unit), "block.experts") is None


def test_without_other_ranks_nothing_is_said() -> None:
    unit = capture(Layer(Block), normal(SEQUENCE, 8))
    for step in (Normalize(), RaiseExperts(), DispatchExperts()):
        step.run(unit)
    assert OverlapSharedExperts().run(unit) == 0
    assert unit.not_overlapped == {}


def test_another_time() -> None:
    with pytest.raises(ValueError, match="got during='both'; it takes 'dispatch', to compute"):
        OverlapSharedExperts("both")  # type: ignore[arg-type]

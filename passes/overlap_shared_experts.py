"""Compute what needs no dispatched token, as shared experts are, while tokens travel."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx

from moe_compile import ops
from moe_compile.capture.boundary import enter, exit
from moe_compile.install.cut import cut
from moe_compile.passes.facts import DISPATCH_WHOLE, EXPERTS_PLACED, LOWERED, PLANNED
from moe_compile.rewrite.expert_weights import PRODUCTS
from moe_compile.rewrite.journeys import Journey
from moe_compile.rewrite.normal_form import is_random
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph, copy_graph

_ARRIVALS = (ops.dispatch, ops.wait_dispatch)
_RETURNS = (ops.combine, ops.wait_combine)

During = Literal["dispatch", "combine"]


@dataclass(frozen=True)
class OverlapSharedExperts(Pass):
    """In: placed experts. Out: work that is independent of them, between a start and its wait.

    The work is that of the smallest module around the experts which has products of its own:
    modules that it calls stay modules. The experts become part of that module's function; where it
    cannot be cut out, or is the layer itself, or has no such work, nothing changes, and the unit
    notes why.

    Attributes:
        during: what is in flight then: the tokens, or the experts' results.

    Raises:
        ValueError: for another value of `during`.
    """

    name = "overlap_shared_experts"
    needs = frozenset({EXPERTS_PLACED})
    breaks = frozenset({DISPATCH_WHOLE, PLANNED, LOWERED})

    during: During = "dispatch"

    def __post_init__(self) -> None:
        if self.during not in get_args(During):
            raise ValueError(
                f"OverlapSharedExperts got during={self.during!r}; it takes 'dispatch', to compute "
                "while tokens travel to the experts, or 'combine', while results travel back"
            )

    def run(self, unit: UnitGraph) -> int:
        """Returns how many blocks of experts have other work beside their tokens' travels."""
        changed = 0
        for at in range(len(_blocks(unit.graph))):
            whole = unit.graph
            unit.graph = copy_graph(whole)
            block = _blocks(unit.graph)[at]
            path = unit.owner(block)
            try:
                _Overlap(unit, block, self.during).run(self.name)
                changed += 1
            except Refuse as refusal:
                unit.graph = whole
                unit.not_overlapped[path] = refusal.reason
        return changed


def _blocks(graph: fx.Graph) -> list[fx.Node]:
    """The first node with which each block of experts sends tokens."""
    return [n for n in graph.nodes if n.target in ops.SENDS and not n.meta.get("chunk")]


class _Overlap:
    """Moves the work beside one block of experts."""

    def __init__(self, unit: UnitGraph, first: fx.Node, during: During) -> None:
        self.unit, self.graph, self.first = unit, unit.graph, first
        self.targets = {"dispatch": _ARRIVALS, "combine": _RETURNS}[during]
        self.calls: tuple[int, ...] = first.meta["calls"]

    def run(self, name: str) -> None:
        owner = self._owner()
        self._lift(owner)
        if self.first.target is ops.dispatch:
            self.first = Journey.of(self.first).split(name)
        self._move(owner)
        self._check(owner)

    def _owner(self) -> int:
        """The innermost call around the experts that has work for the time of their travels."""
        for call in reversed(self.calls):
            if self.unit.calls[call].path is None or self.unit.path(call) == "":
                break
            if any(map(_is_product, self._movable(call))):
                return call
        raise Refuse("no module around its experts computes products that need none of its tokens")

    def _movable(self, call: int) -> list[fx.Node]:
        """The nodes of a call, in order, that neither lead to the experts nor come from them.

        Of a module that is called, all nodes or none.
        """
        inside, behind = self._inside(call), self._behind()
        bound, place = self._before() | behind, inside.index(self._place(behind))
        early, late = set(inside[:place]), set(inside[place:])
        fixed: set[Any] = {_item(n, call) for n in inside if n in bound or n.target in ops.JOURNEYS}
        while True:
            stay = {n for n in inside if _item(n, call) in fixed}
            moving = [n for n in inside if n not in stay]
            users, inputs = stay & early, stay & late
            torn = {
                _item(n, call)
                for n in moving
                if not (users.isdisjoint(n.users) and inputs.isdisjoint(n.all_input_nodes))
            }
            if not torn:
                return moving
            fixed |= torn

    def _place(self, behind: set[fx.Node]) -> fx.Node:
        """The first node before which something is in flight."""
        return next(n for n in self.graph.nodes if n in behind and n.target in self.targets)

    def _inside(self, call: int) -> list[fx.Node]:
        """The nodes between the begin and the end of a call."""
        nodes = list(self.graph.nodes)
        ends = [i for i, n in enumerate(nodes) if n.target in (enter, exit) and n.args[0] == call]
        return nodes[ends[0] + 1 : ends[1]]

    def _before(self) -> set[fx.Node]:
        found, todo = set[fx.Node](), [self.first]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += node.all_input_nodes
        return found

    def _behind(self) -> set[fx.Node]:
        found = {self.first}
        for node in self.graph.nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def _lift(self, owner: int) -> None:
        """Makes the experts part of their owner's function."""
        crossed = frozenset(self.calls[self.calls.index(owner) + 1 :])
        for node in list(self.graph.nodes):
            if node.target in (enter, exit) and node.args[0] in crossed:
                self.graph.erase_node(node)
            elif not crossed.isdisjoint(node.meta.get("calls", ())):
                calls = tuple(c for c in node.meta["calls"] if c not in crossed)
                node.meta |= {
                    "calls": calls,
                    "crosses": node.meta.get("crosses", frozenset()) | crossed,
                }
        self.calls = self.first.meta["calls"]

    def _move(self, owner: int) -> None:
        wait = self._place(self._behind())
        for node in self._movable(owner):
            wait.prepend(node)

    def _check(self, owner: int) -> None:
        """Refuses an owner whose function could not be installed, or on some ranks only."""
        if any(map(is_random, (n for n in self.graph.nodes if owner in n.meta.get("calls", ())))):
            raise Refuse(
                "the module around its experts draws random numbers, in an order that counts"
            )
        piece = cut(self.unit, owner)
        if piece.conditions is not None or self.unit.calls[owner].optional:
            raise Refuse("the module around its experts asks for sizes, so ranks could differ")


def _item(node: fx.Node, call: int) -> fx.Node | int:
    """What moves as a whole: a module that the call makes, or else the node itself."""
    calls: tuple[int, ...] = node.meta.get("calls", ())
    below = calls[calls.index(call) + 1 :] if call in calls else ()
    return below[0] if below else node


def _is_product(node: fx.Node) -> bool:
    return node.target in PRODUCTS or node.target is ops.gated_mlp

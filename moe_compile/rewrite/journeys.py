"""What belongs to one dispatch in a graph, and how it is taken apart into starts and waits."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile import ops
from moe_compile.rewrite.expert_weights import PRODUCTS
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.rewrite.writing import ARRIVALS, Writer


@dataclass(frozen=True)
class Journey:
    """A dispatch in one piece, the experts that its rows go through, and the way back."""

    dispatch: fx.Node
    experts: fx.Node
    combine: fx.Node

    @classmethod
    def of(cls, dispatch: fx.Node) -> "Journey":
        """The journey that begins with a dispatch."""
        parts: dict[Any, fx.Node] = {node.args[1]: node for node in dispatch.users}
        (experts,), (combine,) = parts[0].users, parts[len(ARRIVALS)].users
        assert experts.target is ops.experts
        assert combine.target is ops.combine
        return cls(dispatch, experts, combine)

    def split(self, made_by: str) -> fx.Node:
        """Puts a start, and at once its wait, in the place of dispatch, and of combine.

        Returns:
            the start of dispatch.
        """
        x, ids, weights = (given.meta["val"] for given in self.dispatch.args[:3])  # type: ignore[union-attr]
        done = x.new_empty(1)
        writer = Writer.beside(self.dispatch, made_by)
        with writer.graph.inserting_before(self.dispatch):
            first = writer.add(ops.start_dispatch, self.dispatch.args, [done, x, ids, weights])
            arrived = (*self.dispatch.meta["val"], done)
            wait = writer.add(ops.wait_dispatch, (first, *self.dispatch.args[4:]), arrived)
        _replace(self.dispatch, wait)
        out = self.combine.meta["val"]
        with writer.graph.inserting_before(self.combine):
            start = writer.add(ops.start_combine, self.combine.args, [done, out])
            wait = writer.add(ops.wait_combine, (start, *self.combine.args[2:]), (out, done))
            result = writer.item(wait, 0)
        _replace(self.combine, result)
        return first


def journeys(graph: fx.Graph) -> list[Journey]:
    """Those that are in one piece, in order."""
    return [Journey.of(node) for node in graph.nodes if node.target is ops.dispatch]


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


_STEPS: dict[Any, tuple[str, ...]] = {
    ops.dispatch: ("dispatch",),
    ops.start_dispatch: ("dispatch", "starts"),
    ops.wait_dispatch: ("dispatch", "waits"),
    ops.experts: ("experts",),
    ops.combine: ("combine",),
    ops.start_combine: ("combine", "starts"),
    ops.wait_combine: ("combine", "waits"),
}


def schedule(unit: UnitGraph, path: str) -> str | None:
    """What a module of a lowered graph does from the first start to the last wait, in order.

    None where nothing is started. Children that it calls are named as they are in it.
    """
    calls = {n.meta["calls"] for n in unit.graph.nodes if "op" in n.meta and unit.owner(n) == path}
    call = min(calls)
    inside = [n for n in unit.graph.nodes if n.meta.get("calls", ())[: len(call)] == call]
    at = [i for i, n in enumerate(inside) if n.meta.get("op") in ops.JOURNEYS]
    if not at or inside[at[0]].meta["op"] is not ops.start_dispatch:
        return None
    steps = (_step(unit, node, len(call)) for node in inside[at[0] : at[-1] + 1])
    return " | ".join(dict.fromkeys(step for step in steps if step))


def _step(unit: UnitGraph, node: fx.Node, depth: int) -> str:
    below = node.meta["calls"][depth:]
    if below:
        return unit.path(below[0]).rpartition(".")[2]
    if node.target in PRODUCTS:
        return str(node.target)
    name, *verb = _STEPS.get(node.meta.get("op"), ("",))
    number = [str(node.meta["chunk"])] if "chunk" in node.meta and name else []
    return " ".join((name, *number, *verb))

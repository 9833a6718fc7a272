"""The only place where a graph changes: a proven match is replaced by its canonical form."""

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from moe_compile import ops
from moe_compile.capture.boundary import enter, exit
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.rewrite.dispatch_mask import Mask
from moe_compile.rewrite.expert_bodies import Stacks
from moe_compile.rewrite.matcher import crossed_calls, owner_calls
from moe_compile.rewrite.pattern import Match
from moe_compile.rewrite.region import Region


def apply(match: Match, pass_name: str) -> fx.Node:
    """Replaces the match by the pattern's `after`; returns the node of the canonical op.

    The new nodes carry `meta["made_by"]` (pass and pattern), `meta["kind"]`, the owner calls and
    `meta["crosses"]`: the calls below the owner that are no longer made.
    """
    graph, root = match.root.graph, match.root
    crossed = crossed_calls(match)
    inherited = {
        "val": root.meta["val"],
        "source": root.meta.get("source"),
        "calls": owner_calls(match),
        "made_by": (pass_name, match.pattern.name),
        "kind": match.pattern.kind,
        "crosses": crossed | _inherited_crossings(match),
    }
    new, result = _write(match, inherited)
    root.replace_all_uses_with(result)
    for node in list(graph.nodes):
        if node.target in (enter, exit) and node.args[0] in crossed:
            graph.erase_node(node)
        # What else a call computes that is no longer made, is computed by the owner.
        node.meta["calls"] = tuple(c for c in node.meta.get("calls", ()) if c not in crossed)
    for node in sorted(match.nodes, reverse=True):
        for user in [user for user in node.users if user.target is exit]:
            user.replace_input_with(node, None)  # type: ignore[arg-type]
        if not node.users:
            graph.erase_node(node)
    return new


def _inherited_crossings(match: Match) -> frozenset[int]:
    """What earlier rewrites inside this match had crossed already."""
    return frozenset(call for node in match.nodes for call in node.meta.get("crosses", ()))


def _write(match: Match, meta: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    """Runs `after` on proxies, which appends its nodes before the root.

    Returns:
        the node of the canonical op, and the one that takes the root's place.
    """
    graph, wanted = match.root.graph, match.root.meta["val"].dtype
    tracer = _Writer(graph, meta)
    with graph.inserting_before(match.root):
        arguments = {n: _argument(bound, tracer) for n, bound in match.bindings.items()}
        result: Any = match.pattern.after(**arguments, **match.choice)
        if result.node.meta["val"].dtype != wanted:
            result = torch.ops.aten.to.dtype(result, wanted)
    assert len(tracer.canonical) == 1, "a pattern writes one canonical op"
    return tracer.canonical[0], result.node


def _argument(bound: Any, tracer: GraphAppendingTracer) -> Any:
    """What a pattern's `after` gets for a binding."""
    if isinstance(bound, Stacks):
        return bound.write(lambda node: fx.Proxy(node, tracer))
    if isinstance(bound, Mask):
        return bound.ids(fx.Proxy(bound.node, tracer))
    return fx.Proxy(bound, tracer) if isinstance(bound, fx.Node) else bound


class _Writer(GraphAppendingTracer):
    """Appends nodes with their notes; lets a captured region stand as an argument."""

    def __init__(self, graph: fx.Graph, meta: dict[str, Any]) -> None:
        super().__init__(graph)
        self.meta = meta
        self.canonical: list[fx.Node] = []

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, Region) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta = dict(self.meta)
        if isinstance(node.target, CanonicalOp):
            self.canonical.append(node)
            node.meta["val"] = self._result(node)
        else:
            node.meta["val"] = _fake_value(node)
        return node

    def _result(self, node: fx.Node) -> Any:
        """The root's value; experts give it in the dtype of their tokens."""
        value = self.meta["val"]
        if node.target is not ops.experts:
            return value
        tokens = ops.experts.arguments(*node.args, **node.kwargs)["x"].meta["val"]
        with detect_fake_mode([value]):  # type: ignore[union-attr]
            return value.to(tokens.dtype)


def _fake_value(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with detect_fake_mode(pytree.tree_leaves(args)):  # type: ignore[union-attr]
        return node.target(*args, **kwargs)  # type: ignore[operator]

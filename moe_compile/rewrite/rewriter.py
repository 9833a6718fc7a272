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
    new = _write(match, inherited)
    root.replace_all_uses_with(_in_dtype_of(root, new))
    for node in list(graph.nodes):
        if node.target in (enter, exit) and node.args[0] in crossed:
            graph.erase_node(node)
    for node in sorted(match.nodes, reverse=True):
        for user in [user for user in node.users if user.target is exit]:
            user.replace_input_with(node, None)  # type: ignore[arg-type]
        if not node.users:
            graph.erase_node(node)
    return new


def _in_dtype_of(root: fx.Node, new: fx.Node) -> fx.Node:
    """The new value in the dtype of the old one: experts give that of their tokens."""
    wanted, given = root.meta["val"], new.args[0]
    if new.target is not ops.experts or wanted.dtype == given.meta["val"].dtype:  # type: ignore[union-attr]
        return new
    new.meta["val"] = wanted.to(given.meta["val"].dtype)  # type: ignore[union-attr]
    with root.graph.inserting_after(new):
        cast = root.graph.call_function(torch.ops.aten.to.dtype, (new, wanted.dtype))
    cast.meta = {"val": wanted, "calls": new.meta["calls"]}
    return cast


def _inherited_crossings(match: Match) -> frozenset[int]:
    """What earlier rewrites inside this match had crossed already."""
    return frozenset(call for node in match.nodes for call in node.meta.get("crosses", ()))


def _write(match: Match, meta: dict[str, Any]) -> fx.Node:
    """Runs `after` on proxies, which appends its nodes before the root."""
    graph = match.root.graph
    tracer = _Tracer(graph)
    before = set(graph.nodes)
    with graph.inserting_before(match.root):
        arguments = {n: _argument(bound, tracer) for n, bound in match.bindings.items()}
        result: Any = match.pattern.after(**arguments, **match.choice)
    assert isinstance(result.node.target, CanonicalOp), "a pattern ends in one canonical op"
    for node in sorted(set(graph.nodes) - before):
        node.meta = dict(meta) if node is result.node else meta | {"val": _fake_value(node)}
    return result.node


def _argument(bound: Any, tracer: GraphAppendingTracer) -> Any:
    """What a pattern's `after` gets for a binding."""
    if isinstance(bound, Stacks):
        return bound.write(lambda node: fx.Proxy(node, tracer))
    return fx.Proxy(bound, tracer) if isinstance(bound, fx.Node) else bound


def _fake_value(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with detect_fake_mode(pytree.tree_leaves(args)):  # type: ignore[union-attr]
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Tracer(GraphAppendingTracer):
    """Lets a captured region stand as an argument."""

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, Region) else super().create_arg(a)

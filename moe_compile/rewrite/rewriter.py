"""The only place where a graph changes: a proven match is replaced by its canonical form."""

from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from moe_compile.capture.boundary import enter, exit
from moe_compile.ops.canonical import CanonicalOp
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
        "calls": owner_calls(match),
        "made_by": (pass_name, match.pattern.name),
        "kind": match.pattern.kind,
        "crosses": crossed | _inherited_crossings(match),
    }
    new = _write(match, inherited)
    root.replace_all_uses_with(new)
    for node in list(graph.nodes):
        if node.target in (enter, exit) and node.args[0] in crossed:
            graph.erase_node(node)
    for node in sorted(match.nodes, reverse=True):
        for user in [user for user in node.users if user.target is exit]:
            user.replace_input_with(node, None)  # type: ignore[arg-type]
        if not node.users:
            graph.erase_node(node)
    return new


def _inherited_crossings(match: Match) -> frozenset[int]:
    """What earlier rewrites inside this match had crossed already."""
    return frozenset(call for node in match.nodes for call in node.meta.get("crosses", ()))


def _write(match: Match, meta: dict[str, Any]) -> fx.Node:
    """Runs `after` on proxies, which appends its nodes before the root."""
    graph = match.root.graph
    tracer = _Tracer(graph)
    arguments = {
        name: fx.Proxy(bound, tracer) if isinstance(bound, fx.Node) else bound
        for name, bound in match.bindings.items()
    }
    before = set(graph.nodes)
    with graph.inserting_before(match.root):
        result: Any = match.pattern.after(**arguments, **match.choice)
    for node in set(graph.nodes) - before:
        node.meta = dict(meta)
    assert isinstance(result.node.target, CanonicalOp), "a pattern ends in one canonical op"
    return result.node


class _Tracer(GraphAppendingTracer):
    """Lets a captured region stand as an argument."""

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, Region) else super().create_arg(a)

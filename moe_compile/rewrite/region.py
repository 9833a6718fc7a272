"""A subgraph that a pattern captured whole, such as the activation between two expert GEMMs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.rewrite.normal_form import aten, is_aten, schema_arguments, value
from moe_compile.rewrite.refuse import Refuse

_WITHIN_ROWS = {
    aten.slice.Tensor,
    aten.cat.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}
_POINTWISE = {"aten::to", "aten::where", "aten::masked_fill"}  # torch does not tag all of them


@dataclass(frozen=True, eq=False)
class Region:
    """A function of one tensor, as a graph with one placeholder; called like a function."""

    graph: fx.Graph

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the subgraph. Traces like the code that it was captured from."""
        env: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = x
            elif node.op == "output":
                return env[node.args[0]]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
        raise AssertionError("a region returns a value")

    def __repr__(self) -> str:
        steps = [f"{n.name} = {n.target}{n.args}{n.kwargs or ''}" for n in self.graph.nodes]
        return f"Region({'; '.join(steps)})"


def cut(source: fx.Node, result: fx.Node) -> frozenset[fx.Node] | None:
    """The nodes that lead from `source` to `result`, or None if anything else flows in."""
    inside: set[fx.Node] = set()
    todo = [result]
    while todo:
        node = todo.pop()
        if node is source or node in inside:
            continue
        if node.op != "call_function" or len(inside) > 64:
            return None
        inside.add(node)
        todo += node.all_input_nodes
    return frozenset(inside) if inside else None


def capture(source: fx.Node, result: fx.Node, nodes: frozenset[fx.Node]) -> Region:
    """The region as a function of its source."""
    graph = fx.Graph()
    env = {source: graph.placeholder("x")}
    env[source].meta = dict(source.meta)
    for node in sorted(nodes):
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[result])
    return Region(graph)


def check_row_wise(region: Region) -> None:
    """Refuses a region in which rows (tokens) could mix: it must act on each row alone."""
    rows = [str(size) for size in value(next(iter(region.graph.nodes))).shape[:-1]]
    for node in region.graph.nodes:
        if node.op == "call_function" and not _row_wise(node, rows):
            raise Refuse(f"{node.target} in the activation may mix tokens", node)


def _row_wise(node: fx.Node, rows: list[str]) -> bool:
    """Whether the node keeps every row where it is and looks at no other."""
    if not is_aten(node) or not _has_rows(value(node), rows):
        return False
    operator: Any = node.target
    if torch.Tag.pointwise in operator.tags or operator._schema.name in _POINTWISE:
        ranks = {value(source).dim() for source in node.all_input_nodes}
        return ranks == {value(node).dim()}  # broadcasting to a higher rank could pair rows
    dim = schema_arguments(node)["dim"] if operator in _WITHIN_ROWS else 0
    ranks = [value(n).dim() for n in (node, *node.all_input_nodes)]  # of both, the larger counts
    return dim % max(ranks) >= len(rows)


def _has_rows(result: Any, rows: list[str]) -> bool:
    """Whether a value is a tensor with the same leading sizes, and at least one size more."""
    if not isinstance(result, Tensor) or result.dim() <= len(rows):
        return False
    return [str(size) for size in result.shape[: len(rows)]] == rows

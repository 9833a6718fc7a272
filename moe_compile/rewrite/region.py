"""A subgraph that a pattern captured whole, such as the activation between two expert GEMMs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.kernels.activation import register
from moe_compile.rewrite.normal_form import aten, is_aten, is_random, schema_arguments, value
from moe_compile.rewrite.refuse import Refuse

_WITHIN_ROWS = {
    aten.slice.Tensor,
    aten.cat.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}
"""What works along one dimension."""
_REDUCTIONS = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.linalg_vector_norm.default,
}
"""What sums along dimensions."""
_NORMS = {aten.rms_norm.default, aten.layer_norm.default}
_POINTWISE = {"aten::to", "aten::where", "aten::masked_fill"}  # torch does not tag all of them


@dataclass(frozen=True, eq=False)
class Region:
    """A function of the graph's placeholders, rows first; called like a function.

    Kernels know it by its `key`.
    """

    graph: fx.Graph
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", register(self.graph))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the subgraph. Traces like the code that it was captured from."""
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
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


def check_row_wise(region: Region, what: str = "the activation") -> None:
    """Refuses a region in which rows (tokens) could mix: it must act on each row alone.

    What it computes from its other inputs must be done number by number.
    """
    first, *_ = region.graph.nodes
    rows = [str(size) for size in value(first).shape[:-1]]
    of_rows = {first}
    for node in region.graph.nodes:
        if node.op != "call_function":
            continue
        if not of_rows.isdisjoint(node.all_input_nodes):
            of_rows.add(node)
        if is_random(node):
            remedy = "set the experts' dropout to 0"
            raise Refuse(f"{node.target} in {what} draws random numbers", node, remedy=remedy)
        fits = is_row_wise(node, rows, of_rows) if node in of_rows else is_pointwise(node)
        if not fits:
            raise Refuse(f"{node.target} in {what} may mix tokens", node)


def is_row_wise(node: fx.Node, rows: list[str], of_rows: set[fx.Node]) -> bool:
    """Whether the node keeps every row where it is and looks at no other."""
    if not is_aten(node) or not _has_rows(value(node), rows):
        return False
    if is_pointwise(node):
        # Broadcasting to a higher rank could pair rows, but for a vector that is the same for all.
        sources = _tensors(node.all_input_nodes)
        vectors = {n for n in sources if n not in of_rows and value(n).dim() == 1}
        return {value(n).dim() for n in sources if n not in vectors} == {value(node).dim()}
    # Of a node and what it is computed from, the larger counts.
    rank = max(value(n).dim() for n in _tensors([node, *node.all_input_nodes]))
    dims = _dimensions(node, rank)
    return bool(dims) and all(dim % rank >= len(rows) for dim in dims)


def _tensors(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those of the nodes that are no sizes."""
    return [node for node in nodes if isinstance(value(node), Tensor)]


def _dimensions(node: fx.Node, rank: int) -> list[int]:
    """Along which dimensions an operator works, where that is known."""
    if is_norm(node):
        return list(range(rank - len(schema_arguments(node)["normalized_shape"]), rank))
    if node.target not in _WITHIN_ROWS | _REDUCTIONS:
        return []
    dims = schema_arguments(node)["dim"]
    return [dims] if isinstance(dims, int) else list(dims or ())


def is_norm(node: fx.Node) -> bool:
    """Whether it is one of torch's own norms."""
    return node.target in _NORMS


def is_reduction(node: fx.Node) -> bool:
    """Whether numbers of a row are summed in it."""
    return node.target in _REDUCTIONS or is_norm(node)


def is_pointwise(node: fx.Node) -> bool:
    """Whether it works number by number."""
    operator: Any = node.target
    if not is_aten(node):
        return False
    return torch.Tag.pointwise in operator.tags or operator._schema.name in _POINTWISE


def _has_rows(result: Any, rows: list[str]) -> bool:
    """Whether a value is a tensor with the same leading sizes, and at least one size more."""
    if not isinstance(result, Tensor) or result.dim() <= len(rows):
        return False
    return [str(size) for size in result.shape[: len(rows)]] == rows

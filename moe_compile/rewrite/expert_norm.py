"""Finds the norm after each expert: a function of its results alone, row by row.

Its weight is one vector for all experts, or each expert's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from moe_compile.capture.boundary import enter, exit
from moe_compile.rewrite.expert_bodies import TRANSPARENT, count_from_back
from moe_compile.rewrite.normal_form import aten, schema_arguments, value
from moe_compile.rewrite.region import Region, is_norm, is_pointwise, is_reduction, is_row_wise

_LONGEST = 32


@dataclass(frozen=True)
class Norm:
    """What follows the last product of an expert.

    Attributes:
        result: the node that it ends in.
        region: the function of the product, and of `weight` where there is one.
        weight: the vectors as the rows meet them: a parameter, or what `is_own` of `norm_after`
            told.
        is_own: whether each expert has another weight.
        nodes: everything of it, without the weight.
    """

    result: fx.Node
    region: Region
    weight: fx.Node | None
    is_own: bool
    nodes: frozenset[fx.Node] = field(repr=False)


@dataclass
class _Growing:
    """The nodes that are computed from the product, and from vectors, so far."""

    product: fx.Node
    is_own: Callable[[fx.Node], bool]
    rows: list[str]
    inside: set[fx.Node]
    of_weight: set[fx.Node] = field(default_factory=set[fx.Node])
    weight: fx.Node | None = None

    def takes(self, node: fx.Node) -> bool:
        """Adds a node that is a function of the rows, one by one; tells whether it is."""
        others = [n for n in node.all_input_nodes if n not in self.inside | self.of_weight]
        if not all(map(self._takes_weight, others)):
            return False
        if not is_row_wise(node, self.rows, self.inside):
            return False
        self.inside.add(node)
        return True

    def _takes_weight(self, node: fx.Node) -> bool:
        """Adds a value that is computed from one vector, number by number."""
        if not isinstance(value(node), Tensor):
            return False
        path = set[fx.Node]()
        while node.target in TRANSPARENT or (is_pointwise(node) and not self.is_own(node)):
            if len(node.all_input_nodes) != 1:
                return False
            path.add(node)
            (node,) = node.all_input_nodes
        width = value(self.product).shape[-1:]
        is_shared = node.op == "get_attr" and value(node).shape == width
        if not (is_shared or self.is_own(node)) or self.weight not in (None, node):
            return False
        self.weight = node
        self.of_weight |= {*path, node}
        return True

    def outside(self) -> set[fx.Node]:
        """The nodes that take something of it."""
        users = {user for node in self.inside for user in node.users}
        return {u for u in users - self.inside if u.target not in (enter, exit)}

    def ends_in(self, node: fx.Node) -> bool:
        """Whether nobody takes anything of it but `node`."""
        return all(
            user in self.inside or user.target in (enter, exit)
            for inner in self.inside - {node}
            for user in inner.users
        )

    def norm(self, result: fx.Node) -> Norm:
        """The norm so far."""
        nodes = (self.inside | self.of_weight) - {self.product, self.weight}
        region = self._region(result, sorted(nodes))
        own = self.weight is not None and self.is_own(self.weight)
        return Norm(result, region, self.weight, own, frozenset(nodes))

    def _region(self, result: fx.Node, nodes: list[fx.Node]) -> Region:
        graph, env = fx.Graph(), dict[Any, fx.Node]()
        for name, source in (("rows", self.product), ("weight", self.weight)):
            if source is not None:
                env[source] = graph.placeholder(name)
                env[source].meta = dict(source.meta)
        for node in nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
            count_from_back(env[node])
            if is_norm(node):
                env[node] = _weighed_apart(env[node])
        graph.output(env[result])
        return Region(graph)


def _weighed_apart(norm: fx.Node) -> fx.Node:
    """One of torch's own norms, which takes a vector as its weight; rows have theirs each."""
    arguments = schema_arguments(norm)
    weight = arguments["weight"]
    if norm.target is not aten.rms_norm.default or weight is None:
        return norm
    norm.args = (norm.args[0], norm.args[1], None, arguments["eps"])
    product = norm.graph.call_function(aten.mul.Tensor, (norm, weight))
    product.meta = dict(norm.meta)
    return product


def norm_after(product: fx.Node, is_own: Callable[[fx.Node], bool]) -> Norm | None:
    """What is computed from a product's result before it meets anything else but a weight.

    Args:
        product: the node of the result, with its bias.
        is_own: whether a node is the vector of the product's own expert.
    """
    rows = [str(size) for size in value(product).shape[:-1]]
    growing, found, counted = _Growing(product, is_own, rows, {product}), None, False
    while len(todo := growing.outside()) > 0 and len(growing.inside) < _LONGEST:
        node, weight = min(todo), growing.weight
        if not growing.takes(node):
            return found
        # Casts and the like at the end are left to what follows.
        counted = counted or is_reduction(node) or growing.weight is not weight
        if counted and growing.ends_in(node):
            found, counted = growing.norm(node), False
    return found

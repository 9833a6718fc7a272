"""Finds what experts compute where one operation multiplies by the weights of all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moe_compile.kernels.grouped_mm import grouped_mm
from moe_compile.rewrite.expert_bodies import (
    Bodies,
    Stack,
    Step,
    attempt,
    between,
    side_by_side,
    strip,
)
from moe_compile.rewrite.expert_norm import Norm, norm_after
from moe_compile.rewrite.expert_weights import bias_stacks, is_stored, with_bias
from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse

_BATCHED = {aten.bmm.default, aten.matmul.default}


@dataclass(frozen=True)
class StackedProduct:
    """Rows times a stack.

    Attributes:
        node: the result, with its bias.
        nodes: what computes it from the rows; the rest is as in `Step`.
    """

    node: fx.Node
    rows: fx.Node
    weight: Stack
    nodes: frozenset[fx.Node]
    ends: fx.Node | None = None
    ids: fx.Node | None = None
    missing: tuple[int, ...] = ()
    bias: fx.Node | None = None
    bias_ids: fx.Node | None = None
    norm: Norm | None = None

    @property
    def groups(self) -> tuple[fx.Node | None, fx.Node | None]:
        """What says whose each row is."""
        return self.ends, self.ids

    def up_step(self, place: int) -> Step:
        """A first product as a step."""
        return Step("up", (self.rows,), self.node, place=place, **self._routed())

    def down_step(self) -> Step:
        """The last product as a step, with the norm after it."""
        end, stack = self.node if self.norm is None else self.norm.result, self.norm_stack
        normed = self.norm is not None and self.norm.is_own
        ids = None if stack is None else stack[1]
        return Step("down", (self.rows,), end, normed=normed, norm_ids=ids, **self._routed())

    def _routed(self) -> dict[str, Any]:
        names = ("ends", "ids", "missing", "bias_ids")
        return {name: getattr(self, name) for name in names}

    @property
    def norm_stack(self) -> tuple[fx.Node, fx.Node | None] | None:
        """The vectors of a norm of each expert, and whose each row gets, where that is said."""
        if self.norm is None or self.norm.weight is None or not self.norm.is_own:
            return None
        return picked(self.norm.weight) or (strip(self.norm.weight).args[0], None)

    @property
    def norm_weight(self) -> Stack | fx.Node | None:
        """The weight of the norm, of each expert or of all."""
        if self.norm_stack is not None:
            return Stack((self.norm_stack[0],))
        return self.norm and self.norm.weight


def batched_bodies(graph: fx.Graph) -> Iterator[Bodies | Refuse]:
    """Products of [experts, tokens, ...] with a stack: every expert sees rows for itself."""
    return bodies_of(graph, _batched)


def grouped_bodies(graph: fx.Graph) -> Iterator[Bodies | Refuse]:
    """Grouped products of rows that are sorted by expert."""
    return bodies_of(graph, _grouped)


def bodies_of(
    graph: fx.Graph, read: Callable[[fx.Node], StackedProduct | None]
) -> Iterator[Bodies | Refuse]:
    """The bodies whose products `read` makes out."""
    products = [p for node in graph.nodes if (p := read(node)) is not None]
    while products:
        head = products[0]
        first = [p for p in products if p.rows is head.rows and p.groups == head.groups]
        sources = {p.node for p in first}
        products = [p for p in products if p not in first]
        down = next((p for p in products if between(p.rows, sources) is not None), None)
        if down is not None:
            products.remove(down)
            yield attempt(_assemble, first, down)


def _batched(node: fx.Node) -> StackedProduct | None:
    if node.target not in _BATCHED:
        return None
    rows, weight = node.args[0], whole(node.args[1])
    if weight is None or not isinstance(rows, fx.Node) or value(rows).dim() != 3:
        return None
    if value(rows).shape[0] not in (1, value(weight.parts[0]).shape[0]):
        return None
    result, bias = with_bias(node, _is_batched_vector)
    stored: Any = bias and strip(bias).args[0]
    norm = norm_after(result, _is_batched_vector)
    nodes = frozenset({node, result})
    return StackedProduct(result, rows, weight, nodes, bias=stored, norm=norm)


def _is_batched_vector(node: fx.Node) -> bool:
    """Whether it is a stack of vectors, the same for every row of an expert."""
    node = strip(node)
    is_spread = node.target is aten.unsqueeze.default and bool(node.args[1] == 1)
    return is_spread and is_vectors(node.args[0])


def _grouped(node: fx.Node) -> StackedProduct | None:
    if node.target is not grouped_mm._opoverload:
        return None
    rows, operand, ends = node.args[:3]
    weight = whole(operand)
    assert isinstance(rows, fx.Node)
    assert isinstance(ends, fx.Node)
    if weight is None:
        return None
    return with_vectors(StackedProduct(node, rows, weight, frozenset({node}), ends=ends))


def with_vectors(product: StackedProduct) -> StackedProduct:
    """The product with the bias that is added to it, each row's own, and the norm after it."""
    result, bias = with_bias(product.node, _is_picked_vector)
    found = picked(bias)
    if found is None:
        return replace(product, norm=norm_after(product.node, _is_picked_vector))
    stack, ids = found
    nodes, norm = product.nodes | {result, strip(bias)}, norm_after(result, _is_picked_vector)
    return replace(product, node=result, nodes=nodes, bias=stack, bias_ids=ids, norm=norm)


def _is_picked_vector(node: fx.Node) -> bool:
    """Whether it is each row's own vector."""
    found = picked(node)
    return found is not None and is_vectors(found[0])


def picked(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The stack and the numbers, where the node is `stack[numbers]`."""
    node = strip(node)
    if not isinstance(node, fx.Node) or node.target is not aten.index.Tensor:
        return None
    stack, indices = strip(node.args[0]), node.args[1]
    assert isinstance(indices, (list, tuple))
    alone = len(indices) == 1 and isinstance(indices[0], fx.Node)
    return (stack, indices[0]) if alone and is_stored(stack) else None  # type: ignore[return-value]


def is_vectors(node: Any) -> bool:
    """Whether it is a parameter with a vector for every expert."""
    node = strip(node)
    return isinstance(node, fx.Node) and is_stored(node) and value(node).dim() == 2


def whole(node: Any, transposed: bool = True) -> Stack | None:
    """A parameter that holds all experts; `transposed`: [experts, in, out]."""
    node = strip(node)
    if not isinstance(node, fx.Node) or value(node).dim() != 3:
        return None
    if node.target is aten.transpose.int and set(node.args[1:]) == {1, 2}:
        return whole(node.args[0], not transposed)
    return Stack((node,), transposed) if is_stored(node) else None


def _assemble(first: list[StackedProduct], down: StackedProduct) -> Bodies:
    inner = between(down.rows, {p.node for p in first})
    assert inner is not None
    if down.groups != first[0].groups:
        raise Refuse("the two products of the experts group their rows differently", down.node)
    ups = [p.up_step(place) for place, p in enumerate(first)]
    normed = frozenset() if down.norm is None else down.norm.nodes
    act = Step("act", tuple(p.node for p in first), down.rows)
    return Bodies(
        count=value(down.weight.parts[0]).shape[0],
        steps=(*ups, act, down.down_step()),
        nodes=frozenset(inner).union(*(p.nodes for p in (*first, down)), normed),
        up=tuple(p.weight for p in first),
        down=down.weight,
        activation=side_by_side([p.node for p in first], down.rows, inner),
        up_bias=bias_stacks([p.bias and Stack((p.bias,)) for p in first], first[0].node),
        down_bias=down.bias and Stack((down.bias,)),
        norm=down.norm and down.norm.region,
        norm_weight=down.norm_weight,
    )

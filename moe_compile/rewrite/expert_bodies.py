"""Finds what each expert computes: two matrix products with that expert's own weights.

A *body* is the part of a graph between the rows that an expert gets and the rows that it gives
back. Which rows these are, and what becomes of them, is not looked at here: see `routing`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import Region

_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
_TRANSPARENT = {aten.to.dtype, aten.clone.default, aten.detach.default}


@dataclass(frozen=True)
class Stack:
    """One weight of every expert.

    Attributes:
        parts: each expert's own node, in their order; or the one node that holds all of them.
        transposed: whether an expert's weight is [in, out].
    """

    parts: tuple[fx.Node, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Stacks:
    """An argument of the canonical op: stacks side by side, all lying alike.

    They are put together in the graph where the model stores them apart.
    """

    stacks: tuple[Stack, ...]
    transposed: bool

    def write(self, proxy: Callable[[fx.Node], fx.Proxy]) -> Any:
        """Appends the nodes that put the stacks together; returns the last one's proxy."""
        written = [self._write_one(stack, proxy) for stack in self.stacks]
        if len(written) == 1:
            return written[0]
        last = value(self.stacks[0].parts[0]).dim() + (len(self.stacks[0].parts) > 1) - 1
        return aten.cat.default(written, last if self.transposed or last == 1 else 1)

    def _write_one(self, stack: Stack, proxy: Callable[[fx.Node], fx.Proxy]) -> Any:
        parts: list[Any] = [proxy(part) for part in stack.parts]
        whole = parts[0] if len(parts) == 1 else aten.stack.default(parts)
        if stack.transposed != self.transposed:
            return aten.transpose.int(whole, 1, 2)
        return whole


@dataclass(frozen=True)
class Bodies:
    """The bodies of all experts of one block: the same computation on other weights.

    Attributes:
        rows, results: each expert's input and output.
        nodes: everything between them, without the weights.
        up: the stacks of the first products, which `activation` takes side by side.
    """

    rows: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node] = field(repr=False)
    up: tuple[Stack, ...]
    down: Stack
    activation: Region
    up_bias: tuple[Stack, ...] = ()
    down_bias: Stack | None = None

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.rows)


@dataclass(frozen=True)
class _Weight:
    """A weight as one expert uses it: of which family, whose, how it lies, and from where."""

    family: str
    expert: int
    transposed: bool
    node: fx.Node
    whole: fx.Node | None


@dataclass(frozen=True)
class _Product:
    node: fx.Node
    rows: fx.Node
    weight: _Weight
    bias: Any


def unrolled_bodies(graph: fx.Graph) -> Iterator[Bodies]:
    """The bodies of every block whose experts stand one after the other in the graph.

    Raises:
        Refuse: products with the weights of experts that are no bodies.
    """
    products = _products(graph)
    while products:
        block = _take_block(products)
        if block is not None:
            yield _assemble(block)


def _products(graph: fx.Graph) -> list[_Product]:
    numbered = _numbered_parameters(graph)
    found: list[_Product] = []
    for node in graph.nodes:
        if node.target not in _PRODUCTS or not isinstance(node.args[1], fx.Node):
            continue
        weight = _weight(node.args[1], numbered, node.target is not aten.linear.default)
        if weight is not None:
            bias = node.args[2] if len(node.args) > 2 else None
            found.append(_Product(node, _strip(node.args[0]), weight, bias))
    return found


def _numbered_parameters(graph: fx.Graph) -> dict[str, tuple[str, int]]:
    """Parameters that are one of a row, such as `experts.3.up.weight`: their family and number."""
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    shapes = {str(n.target): tuple(value(n).shape) for n in graph.nodes if n.op == "get_attr"}
    families: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        for digits in re.finditer(r"\d+", name):
            family = f"{name[: digits.start()]}#{name[digits.end() :]}"
            families[family][int(digits.group())] = name
    found: dict[str, tuple[str, int]] = {}
    for family, members in sorted(families.items(), key=lambda item: len(item[1])):
        alike = len({shapes[name] for name in members.values()}) == 1
        if alike and len(members) > 1 and set(members) == set(range(len(members))):
            found |= {name: (family, number) for number, name in members.items()}
    return found


def _weight(
    node: fx.Node, numbered: dict[str, tuple[str, int]], transposed: bool
) -> _Weight | None:
    """Whose weight the operand of a product is; None for that of no expert."""
    node = _strip(node)
    if node.target is aten.transpose.int:
        return _weight(node.args[0], numbered, not transposed)  # type: ignore[arg-type]
    if node.op == "get_attr":
        family, expert = numbered.get(str(node.target), ("", -1))
        return _Weight(family, expert, transposed, node, None) if family else None
    part = _part_of_stack(node)
    if part is None:
        return None
    whole, expert = part
    return _Weight(f"{whole}", expert, transposed, node, whole)


def _part_of_stack(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The stack and the number, where the node is one expert's part of a whole parameter."""
    if node.target is aten.select.int and node.args[1] == 0:
        whole, index = node.args[0], node.args[2]
    elif node.target in (aten.squeeze.dim, aten.reshape.default):
        whole, index = _single_slice(node.args[0])
    else:
        return None
    if not isinstance(whole, fx.Node) or not isinstance(index, int) or not _is_stored(whole):
        return None
    return whole, index


def _single_slice(node: Any) -> tuple[Any, Any]:
    """What `x[i : i + 1]` is taken from, and i."""
    if isinstance(node, fx.Node) and node.target is aten.slice.Tensor and node.args[1] == 0:
        start, end = node.args[2:4]
        if isinstance(start, int) and end == start + 1:  # type: ignore[operator]
            return node.args[0], start
    return None, None


def _is_stored(node: fx.Node) -> bool:
    """Whether the node is a parameter with an expert dimension, or a view of one."""
    while node.target in (aten.reshape.default, *_TRANSPARENT):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr"


def _strip(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _TRANSPARENT:
        node = node.args[0]
    return node


def _take_block(products: list[_Product]) -> dict[int, list[_Product]] | None:
    """Takes out the products of one block: of the first one's experts, as far as they reach."""
    families = {p.weight.family for p in _of_first_body(products)}
    block = [p for p in products if p.weight.family in families]
    products[:] = [p for p in products if p.weight.family not in families]
    if len(families) < 2:
        return None
    by_expert: dict[int, list[_Product]] = defaultdict(list)
    for product in block:
        by_expert[product.weight.expert].append(product)
    return by_expert


def _of_first_body(products: list[_Product]) -> list[_Product]:
    """The first product, those of its expert that share its rows, and the next one after them."""
    first = products[0]
    own = {p.node: p for p in products if p.weight.expert == first.weight.expert}
    found = {node: p for node, p in own.items() if p.rows is first.rows}
    todo, seen = [user for node in found for user in node.users], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in own:
            found[node] = own[node]
        elif node not in seen and _leading(node) == _leading(first.node):
            seen.add(node)
            todo += node.users
    return list(found.values())


def _leading(node: fx.Node) -> list[str]:
    """The sizes of a value but for its last."""
    result = node.meta.get("val")
    return [str(size) for size in result.shape[:-1]] if isinstance(result, Tensor) else []


def _inner(product: _Product, sources: set[fx.Node]) -> set[fx.Node] | None:
    """The nodes that lead from `sources`, and from nothing else, to a product's rows."""
    inside: set[fx.Node] = set()
    todo, reached = [product.node.args[0]], False
    while todo:
        node = todo.pop()
        if node in sources:
            reached = True
        elif isinstance(node, fx.Node) and node not in inside:
            if len(inside) > 64 or node.op == "placeholder":
                return None
            inside.add(node)
            todo += node.all_input_nodes
    return inside if reached else None


def _assemble(by_expert: dict[int, list[_Product]]) -> Bodies:
    numbers = sorted(by_expert)
    sample = by_expert[numbers[0]][0]
    if numbers != list(range(len(numbers))):
        raise Refuse("some experts of a row are not used", sample.node)
    bodies = [_Body.of(by_expert[number]) for number in numbers]
    if len({body.signature for body in bodies}) > 1:
        raise Refuse("the experts of a row compute different things", sample.node)
    if sample.weight.whole is not None and value(sample.weight.whole).shape[0] != len(bodies):
        raise Refuse("some experts of a stack are not used", sample.node)
    firsts = range(len(bodies[0].first))
    return Bodies(
        rows=tuple(body.first[0].rows for body in bodies),
        results=tuple(body.down.node for body in bodies),
        nodes=frozenset(node for body in bodies for node in body.nodes),
        up=tuple(_stack([body.first[i].weight for body in bodies]) for i in firsts),
        down=_stack([body.down.weight for body in bodies]),
        activation=bodies[0].activation,
        up_bias=tuple(
            _bias_stack([body.first[i].bias for body in bodies])
            for i in firsts
            if bodies[0].first[i].bias is not None
        ),
        down_bias=_bias_stack([body.down.bias for body in bodies])
        if bodies[0].down.bias is not None
        else None,
    )


def _stack(weights: list[_Weight]) -> Stack:
    whole, transposed = weights[0].whole, weights[0].transposed
    if whole is not None:
        return Stack((whole,), transposed)
    return Stack(tuple(weight.node for weight in weights), transposed)


def _bias_stack(biases: list[fx.Node]) -> Stack:
    parts = [_part_of_stack(_strip(bias)) for bias in biases]
    if parts[0] is not None:
        return Stack((parts[0][0],))
    return Stack(tuple(_strip(bias) for bias in biases))


@dataclass(frozen=True)
class _Body:
    """One expert: products of its rows, what comes between, and the last product."""

    first: list[_Product]
    down: _Product
    nodes: frozenset[fx.Node]
    activation: Region
    signature: str

    @classmethod
    def of(cls, products: list[_Product]) -> "_Body":
        own = {p.node for p in products}
        later = [p for p in products if any(_reaches(p.rows, node) for node in own - {p.node})]
        first = [p for p in products if p not in later]
        if len(later) != 1 or len({p.rows for p in first}) != 1:
            raise Refuse("an expert is not two products around an activation", products[-1].node)
        down, sources = later[0], {p.node for p in first}
        inner = _inner(down, sources)
        if inner is None or any(node.op == "get_attr" for node in inner):
            raise Refuse("something else flows into an expert's activation", down.node)
        order = {node: i for i, node in enumerate(p.node for p in first)}
        region = _region([p.node for p in first], down.node.args[0], inner)
        biased = [p.bias is not None for p in (*first, down)]
        layout = [(p.weight.family, p.weight.transposed, p.node.target) for p in (*first, down)]
        text = f"{_signature(down.node.args[0], order, {})} {layout} {biased}"
        return cls(first, down, frozenset({*sources, *inner, down.node}), region, text)


def _reaches(node: Any, source: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node is source:
            return True
        if isinstance(node, fx.Node) and node not in seen and node >= source:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _signature(node: Any, sources: dict[fx.Node, int], seen: dict[fx.Node, int]) -> str:
    """A spelling of the computation that is equal for equal ones."""
    if isinstance(node, (list, tuple)):
        return f"[{', '.join(_signature(n, sources, seen) for n in node)}]"
    if not isinstance(node, fx.Node):
        return repr(node)
    if node in sources:
        return f"source {sources[node]}"
    if node in seen:
        return f"value {seen[node]}"
    parts = [_signature(a, sources, seen) for a in (*node.args, *node.kwargs.values())]
    seen[node] = len(seen)
    return f"{node.target}({', '.join(parts)}; {list(node.kwargs)})"


def _region(sources: list[fx.Node], result: Any, inner: set[fx.Node]) -> Region:
    """The activation as a function of the first products' results side by side."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    widths = [value(source).shape[-1] for source in sources]
    first: Tensor = value(sources[0])
    with first.fake_mode:  # type: ignore[attr-defined]
        x.meta = {"val": first.new_empty(*first.shape[:-1], sum(widths))}
    env: dict[fx.Node, fx.Node] = {}
    for source, end in zip(sources, torch.tensor(widths).cumsum(0).tolist(), strict=True):
        env[source] = x if len(sources) == 1 else _columns(graph, x, source, end)
    for node in sorted(inner):
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[result])
    return Region(graph)


def _columns(graph: fx.Graph, x: fx.Node, source: fx.Node, end: int) -> fx.Node:
    last = value(source).dim() - 1
    start = end - value(source).shape[-1]
    node = graph.call_function(aten.slice.Tensor, (x, last, start, end))
    node.meta = dict(source.meta)
    return node

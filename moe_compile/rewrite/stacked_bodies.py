"""Finds what experts compute where one operation multiplies by the weights of all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from moe_compile.rewrite.expert_weights import is_stored
from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse

_BATCHED = {aten.bmm.default, aten.matmul.default}


@dataclass(frozen=True)
class _Product:
    node: fx.Node
    rows: fx.Node
    weight: Stack
    ends: fx.Node | None


def batched_bodies(graph: fx.Graph) -> Iterator[Bodies | Refuse]:
    """Products of [experts, tokens, ...] with a stack: every expert sees rows for itself."""
    return _bodies(graph, _batched)


def grouped_bodies(graph: fx.Graph) -> Iterator[Bodies | Refuse]:
    """Grouped products of rows that are sorted by expert."""
    return _bodies(graph, _grouped)


def _bodies(
    graph: fx.Graph, read: Callable[[fx.Node], _Product | None]
) -> Iterator[Bodies | Refuse]:
    products = [p for node in graph.nodes if (p := read(node)) is not None]
    while products:
        first = [p for p in products if p.rows is products[0].rows and p.ends is products[0].ends]
        sources = {p.node for p in first}
        products = [p for p in products if p not in first]
        down = next((p for p in products if between(p.rows, sources) is not None), None)
        if down is not None:
            products.remove(down)
            yield attempt(_assemble, first, down)


def _batched(node: fx.Node) -> _Product | None:
    if node.target not in _BATCHED:
        return None
    rows, weight = node.args[0], _whole(node.args[1])
    if weight is None or not isinstance(rows, fx.Node) or value(rows).dim() != 3:
        return None
    is_aligned = value(rows).shape[0] == value(weight.parts[0]).shape[0]
    return _Product(node, rows, weight, None) if is_aligned else None


def _grouped(node: fx.Node) -> _Product | None:
    if node.target is not grouped_mm._opoverload:
        return None
    rows, operand, ends = node.args[:3]
    weight = _whole(operand)
    assert isinstance(rows, fx.Node)
    assert isinstance(ends, fx.Node)
    return None if weight is None else _Product(node, rows, weight, ends)


def _whole(node: Any, transposed: bool = True) -> Stack | None:
    """A parameter that holds all experts; `transposed`: [experts, in, out]."""
    node = strip(node)
    if not isinstance(node, fx.Node) or value(node).dim() != 3:
        return None
    if node.target is aten.transpose.int and set(node.args[1:]) == {1, 2}:
        return _whole(node.args[0], not transposed)
    return Stack((node,), transposed) if is_stored(node) else None


def _assemble(first: list[_Product], down: _Product) -> Bodies:
    inner = between(down.rows, {p.node for p in first})
    assert inner is not None
    if down.ends is not first[0].ends:
        raise Refuse("the two products of the experts group their rows differently", down.node)
    ups = [Step("up", (p.rows,), p.node, ends=p.ends, place=place) for place, p in enumerate(first)]
    act = Step("act", tuple(p.node for p in first), down.rows)
    return Bodies(
        count=value(down.weight.parts[0]).shape[0],
        steps=(*ups, act, Step("down", (down.rows,), down.node, ends=down.ends)),
        nodes=frozenset({*inner, *(p.node for p in first), down.node}),
        up=tuple(p.weight for p in first),
        down=down.weight,
        activation=side_by_side([p.node for p in first], down.rows, inner),
    )

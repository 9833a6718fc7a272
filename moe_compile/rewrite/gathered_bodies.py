"""Finds what experts compute where every row gets a copy of its own expert's weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx

from moe_compile.rewrite.expert_bodies import Bodies, Stack, strip
from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.stacked_bodies import (
    StackedProduct,
    bodies_of,
    picked,
    with_vectors,
)

_MATMULS = {aten.bmm.default, aten.matmul.default}


def gathered_bodies(graph: fx.Graph) -> Iterator[Bodies | Refuse]:
    """Products of rows with `stack[ids]`, by `einsum` or batched products."""
    return bodies_of(graph, _gathered)


def _gathered(node: fx.Node) -> StackedProduct | None:
    if node.target is aten.einsum.default:
        product = _einsum(node)
    elif node.target in _MATMULS:
        product = _row_first(node) or _row_last(node)
    else:
        return None
    return None if product is None else with_vectors(product)


def _einsum(node: fx.Node) -> StackedProduct | None:
    """`einsum("ti,tkio->tko", rows, stack[ids])`, in any letters and either order."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) != 2 or not arrow or "." in equation:
        return None
    for first, second in ((0, 1), (1, 0)):
        product = _product(node, operands[first], operands[second])
        if product is not None:
            return _in_letters(product, letters[first], letters[second], out)
    return None


def _in_letters(product: StackedProduct, rows: str, weight: str, out: str) -> StackedProduct | None:
    """The product as the equation has it; None if it is another one."""
    batch, (last_but_one, last) = weight[:-2], weight[-2:]
    for summed, kept, transposed in ((last_but_one, last, True), (last, last_but_one, False)):
        missing = tuple(i for i, letter in enumerate(batch) if letter not in rows)
        known = "".join(letter for letter in batch if letter in rows)
        if rows == known + summed and out == batch + kept:
            stack = Stack(product.weight.parts, transposed)
            return replace(product, weight=stack, missing=missing)
    return None


def _row_first(node: fx.Node) -> StackedProduct | None:
    """`(rows.unsqueeze(-2) @ stack[ids]).squeeze(-2)`, [in, out]."""
    return _unsqueezed(node, node.args[0], node.args[1], -2)


def _row_last(node: fx.Node) -> StackedProduct | None:
    """`(stack[ids] @ rows.unsqueeze(-1)).squeeze(-1)`, [out, in]."""
    return _unsqueezed(node, node.args[1], node.args[0], -1)


def _unsqueezed(node: fx.Node, rows: Any, weight: Any, dim: int) -> StackedProduct | None:
    rank = value(node).dim()
    result, rows = next(iter(node.users), None), strip(rows)
    if len(node.users) != 1 or result is None or value(rows).dim() != rank:
        return None
    if rows.target is not aten.unsqueeze.default or rows.args[1] != rank + dim:
        return None
    if result.target is not aten.squeeze.dim or result.args[1] != rank + dim:
        return None
    product = _product(result, rows.args[0], weight)
    if product is None or product.ids is None or value(product.ids).dim() != rank - 2:
        return None
    transposed = product.weight.transposed == (dim == -2)
    stack = Stack(product.weight.parts, transposed)
    return replace(product, weight=stack, nodes=product.nodes | {node, rows})


def _product(result: fx.Node, rows: Any, weight: Any) -> StackedProduct | None:
    """The product of rows with a gathered stack, as [in, out] unless it is transposed."""
    weight, rank = strip(weight), value(strip(weight)).dim()
    nodes, straight = {result, weight}, True
    if weight.target is aten.transpose.int and set(weight.args[1:]) == {rank - 2, rank - 1}:
        weight, straight = strip(weight.args[0]), False
        nodes.add(weight)
    found = picked(weight)
    if found is None or value(found[0]).dim() != 3 or not isinstance(rows, fx.Node):
        return None
    stack = Stack((found[0],), straight)
    return StackedProduct(result, rows, stack, frozenset(nodes), ids=found[1])

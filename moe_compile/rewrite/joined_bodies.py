"""Finds bodies whose activation runs once, on the joined results of all first products."""

import operator
from collections.abc import Iterator

from torch import fx

from moe_compile.rewrite.expert_bodies import Bodies, Step, attempt, between, side_by_side
from moe_compile.rewrite.expert_weights import (
    Product,
    bias_stacks,
    norm_weight_of,
    stack_of,
    vector_stack_of,
)
from moe_compile.rewrite.normal_form import aten
from moe_compile.rewrite.refuse import Refuse

_CUTS = {aten.slice.Tensor, operator.getitem, aten.split_with_sizes.default, aten.split.sizes}
_JOINS = {aten.cat.default, aten.slice_scatter.default, aten.index_put.default, aten.copy.default}


def around_one_activation(singles: list[dict[int, list[Product]]]) -> Iterator[Bodies | Refuse]:
    """Products of all experts, one activation of their joined results, and products of its pieces.

    That the pieces are cut where they were joined is part of the proof of the routing.
    """
    while singles:
        first = singles.pop(0)
        for second in list(singles):
            hidden = _joined_hidden(first, second)
            bodies = hidden and attempt(_assemble_joined, first, second, *hidden)
            if isinstance(bodies, Bodies):
                singles.remove(second)
            if bodies is not None:
                yield bodies


def _joined_hidden(
    first: dict[int, list[Product]], second: dict[int, list[Product]]
) -> tuple[fx.Node, fx.Node] | None:
    """The joined results of the first products, and what the second ones take pieces of."""
    if first.keys() != second.keys():
        return None
    sources = {_uncut(p.rows) for products in second.values() for p in products}
    joints = {joint for source in sources for joint in _joints_above(source)}
    if len(sources) != 1 or len(joints) != 1:
        return None
    (result,), (joint,) = sources, joints
    ups = {p.node for products in first.values() for p in products}
    return (joint, result) if len(ups) == len(first) and _joined(joint, ups) == ups else None


def _joined(joint: fx.Node, products: set[fx.Node]) -> set[fx.Node]:
    """Those of the products that a node puts together."""
    found: set[fx.Node] = set()
    todo = [joint]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node in products:
                found.add(node)
            elif node.target in _JOINS or node.target is aten.expand.default:
                todo.append(node)
    return found


def _uncut(node: fx.Node) -> fx.Node:
    """What a piece is a piece of."""
    while node.target in _CUTS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _joints_above(node: fx.Node) -> set[fx.Node]:
    """The nearest nodes above that put rows together."""
    found: set[fx.Node] = set()
    todo, seen = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.target in _JOINS:
            found.add(node)
        elif node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return found


def _assemble_joined(
    first: dict[int, list[Product]],
    second: dict[int, list[Product]],
    joint: fx.Node,
    hidden: fx.Node,
) -> Bodies:
    ups, downs = ([block[e][0] for e in sorted(block)] for block in (first, second))
    inner = between(hidden, {joint})
    if inner is None:
        raise Refuse("something else flows into the experts' activation", hidden)
    if len({p.norm_signature for p in downs}) > 1:
        raise Refuse("the experts of a row have different norms", hidden)
    up_steps = [Step("up", (p.operand,), p.node, p.weight.expert) for p in ups]
    down_steps = [
        Step("down", (p.operand,), p.end, p.weight.expert, normed=p.is_normed) for p in downs
    ]
    return Bodies(
        count=len(ups),
        steps=(*up_steps, Step("act", (joint,), hidden), *down_steps),
        nodes=frozenset(inner).union(*(p.nodes for p in ups), *(p.last_nodes for p in downs)),
        up=(stack_of([p.weight for p in ups]),),
        down=stack_of([p.weight for p in downs]),
        activation=side_by_side([joint], hidden, inner),
        up_bias=bias_stacks([vector_stack_of([p.bias for p in ups])], joint),
        down_bias=vector_stack_of([p.bias for p in downs]),
        norm=downs[0].norm and downs[0].norm.region,
        norm_weight=norm_weight_of([p.norm for p in downs]),
    )

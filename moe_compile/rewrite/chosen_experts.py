"""Tells experts that tokens choose from, however they do, from weights that all go through alike.

There is a choice where data picks each one's rows, or where every token has a score for each of
them. Such scores are a router's own for them, or a part of what it gives, where a choice is made in
it: a top-k, a mask, a softmax. Shared experts whose weights are other scores of a router are
chosen from no more than those without weights, or than the groups of a grouped projection.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx

from moe_compile.capture.boundary import enter, exit
from moe_compile.kernels.grouped_mm import grouped_mm
from moe_compile.rewrite.normal_form import aten, schema_arguments, value

PRODUCTS = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.mv.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    grouped_mm._opoverload,
}
_MIXES = {*PRODUCTS, aten.scaled_dot_product_attention.default}

_STEPS = {
    aten.eq,
    aten.ne,
    aten.gt,
    aten.ge,
    aten.lt,
    aten.le,
    aten.sign,
    aten.round,
    aten.floor,
    aten.ceil,
    aten.relu,
    aten.threshold,
    aten.one_hot,
    aten.embedding,
}
"""What makes masks, or looks weights up: of scores alone, as activations may be spelled with it."""

_SELECTIONS = {
    aten.topk,
    aten.sort,
    aten.argsort,
    aten.argmax,
    aten.argmin,
    aten.max,
    aten.min,
    aten.kthvalue,
    aten.median,
}
_SOFTMAXES = {aten.softmax, aten.log_softmax, aten.logsumexp}
_NORMALIZES = {*_SOFTMAXES, aten.sum}


def are_chosen(
    members: list[fx.Node], count: int, products: list[fx.Node], computed: list[fx.Node]
) -> bool:
    """Whether scores take part in what a stack's products get or give.

    Args:
        members: the products with the stack, or with one each of its weights.
        count: how many weights it has.
        products: all of the unit's with weights, routers' too.
        computed: all that it computes from data.
    """
    results = _results(members)
    others = [node for node in products if node not in results]
    scores = [node for node in others if _are_scores(node, count)]
    choices = [n for n in computed if n not in results and _is_choice(n, count)]
    return _take_part([*scores, *choices], results) or _mix_slots(others, results)


def _results(members: list[fx.Node]) -> set[fx.Node]:
    """The products, and all that is computed from them before others are."""
    found, todo = set(members), [user for node in members for user in node.users]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += () if _ends(node) else node.users
    return found


def _take_part(scores: Iterable[fx.Node], results: set[fx.Node]) -> bool:
    """Whether scores are for the results: what is only added to them is another's."""
    met = (node for node in _following(scores, results) if node in results)
    return any(node.target is not aten.add.Tensor for node in met)


def _mix_slots(products: list[fx.Node], results: set[fx.Node]) -> bool:
    """Whether a softmax over all that a product gives mixes results, as if each were a slot."""
    parts = {aten.slice.Tensor, aten.select.int}
    behind = _following(products, results, parts)
    softmaxes = [node for node in behind if _packet(node) in _SOFTMAXES]
    met = (node for node in _following(softmaxes, results, parts) if node in results)
    return any(node.target in PRODUCTS and node not in products for node in met)


def _following(
    nodes: Iterable[fx.Node], results: set[fx.Node], ends: Iterable[Any] = ()
) -> Iterator[fx.Node]:
    """What is computed from nodes, up to products and the results."""
    seen, todo = set[fx.Node](), [user for node in nodes for user in node.users]
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function" or node.target in (enter, exit):
            continue
        seen.add(node)
        yield node
        if node not in results and not _ends(node) and node.target not in ends:
            todo += node.users


def _ends(node: fx.Node) -> bool:
    """Whether what it computes is no longer the same rows or scores."""
    return node.target in _MIXES or "op" in node.meta


def _is_choice(node: fx.Node, count: int) -> bool:
    """Whether it chooses among this many, softly or not."""
    packet = _packet(node)
    if packet in _STEPS:
        return _are_scores(node, count)
    if packet in _SELECTIONS:
        return _are_scores(node.all_input_nodes[0], count)
    if node.target is aten.slice.Tensor:
        return _are_scores(node, count) and _are_masked(node.all_input_nodes[0])
    return packet in _NORMALIZES and count in _reduced(node)


def _are_masked(scores: fx.Node) -> bool:
    """Whether a mask was made, before some were taken of what has more of them."""
    seen, todo = set[fx.Node](), [scores]
    while todo:
        node = todo.pop()
        if node not in seen and not _ends(node) and _are_scores(node, _sizes(scores)[-1]):
            seen.add(node)
            todo += node.all_input_nodes
    return any(_packet(node) in _STEPS for node in seen)


def _reduced(node: fx.Node) -> list[int | None]:
    """The sizes that it makes one number of, or adds up to one."""
    dims = schema_arguments(node).get("dim") or 0
    dims = [dims] if isinstance(dims, int) else dims
    return [size for i, size in enumerate(_sizes(node.all_input_nodes[0])) if i in dims]


def _are_scores(node: fx.Node, count: int | None) -> bool:
    """Whether it has a number for each of them, and no features."""
    sizes = _sizes(node)
    alone = sizes[-1:] in ([1], [count]) or {*sizes} <= {1, count, None}
    return count is not None and count in sizes and alone


def _sizes(node: fx.Node) -> list[int | None]:
    """Of a tensor, None for those of tokens, which are any number."""
    shape: Any = value(node).shape if isinstance(value(node), Tensor) else ()
    return [size if isinstance(size, int) else None for size in shape]


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)

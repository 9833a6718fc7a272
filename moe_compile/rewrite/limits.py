"""Finds limits on how many tokens count: a proof on few tokens cannot see where they bite.

An expert's capacity, say: a token's place among those of its expert, compared with a constant. What
is computed below such a constant holds for less than that many tokens, and for them only.
"""

import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.rewrite.normal_form import aten, schema_arguments, schema_names, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.routing_proof import Cut, is_size, per_row

_COUNTS = {
    aten.histc.default,
    aten.bincount.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.where.default,
    aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
}
_TOTALS = {
    aten.cumsum.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.argsort.default,
    aten.argsort.stable,
    aten.argmax.default,
    aten.argmin.default,
}
_PAIRS = {aten.sort.default, aten.sort.stable, aten.topk.default, aten.max.dim, aten.min.dim}
"""Values and their places."""

_RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_SHIFTS = {
    *(getattr(aten, name).Scalar for name in ("lt", "le", "gt", "ge", "eq", "ne")),
    *(getattr(aten, name).Tensor for name in ("lt", "le", "gt", "ge", "eq", "ne")),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    *(aten.minimum.default, aten.maximum.default, aten.add.Tensor, aten.sub.Tensor),
    *(aten.rsub.Scalar, aten.one_hot.default),
}
_DIVISIONS = {
    aten.floor_divide.default,
    aten.div.Tensor,
    aten.div.Tensor_mode,
    aten.remainder.Scalar,
}
_CHOOSING = {"index", "indices", "mask", "condition", "repeats"}
"""Arguments that say where values come from, and are none themselves."""


def check_no_limit(cut: Cut) -> None:
    """Refuses a limit among the nodes that compute the result of a cut."""
    counts, known = set[fx.Node](), {cut.tokens, cut.ids, cut.free}
    choices = max(cut.bodies.count, per_row(cut.ids))
    for node in cut.inner:
        if node.op != "call_function":
            continue
        if not is_size(node) and any(source in known for source in node.all_input_nodes):
            known.add(node)
        limit = _limit(node, counts, known, choices)
        if limit is not None:
            reason = f"tokens beyond a limit of {limit} go another way"
            raise Refuse(reason, node, remedy="let a mask [tokens, experts] say who goes where")
        if _is_count(node, counts):
            counts.add(node)


def _is_count(node: fx.Node, counts: set[fx.Node]) -> bool:
    """Whether its values grow with the number of tokens."""
    result = value(node)
    if isinstance(result, Tensor) and result.dtype == torch.bool:
        return False
    if node.target is operator.getitem and node.args[0].target in _PAIRS:  # type: ignore[union-attr]
        pair: Any = node.args[0]
        return _is_over_tokens(pair) if node.args[1] == 1 else pair.args[0] in counts
    if node.target in _COUNTS or (node.target in _TOTALS and _is_over_tokens(node)):
        return True
    if node.target in _RANGES:
        return not isinstance(result.shape[0], int)
    return node.target not in _PAIRS and any(source in counts for source in _carried(node))


def _is_over_tokens(node: fx.Node) -> bool:
    """Whether it looks along a dimension of any size."""
    shape: list[Any] = list(value(node.all_input_nodes[0]).shape)
    dims = schema_arguments(node).get("dim")
    chosen = [dims] if isinstance(dims, int) else dims or range(len(shape))
    return any(not isinstance(shape[dim], int) for dim in chosen)


def _carried(node: fx.Node) -> Iterator[fx.Node]:
    """The operands whose values the result may hold."""
    names = schema_names(node) or ["" for _ in node.args]
    for name, operand in [*zip(names, node.args, strict=False), *node.kwargs.items()]:
        several: Any = operand if isinstance(operand, (list, tuple)) else [operand]
        if name not in _CHOOSING:
            yield from (each for each in several if isinstance(each, fx.Node))


def _limit(node: fx.Node, counts: set[fx.Node], known: set[fx.Node | None], choices: int) -> Any:
    """What bounds a count in a node: a literal, a size, or a constant tensor; None without one.

    Dividing by as many as the `choices` turns places of picks into tokens, and is none.
    """
    if node.target is aten.slice.Tensor:
        return _slice_limit(node)
    if not any(source in counts for source in _carried(node)):
        return None
    if node.target in _DIVISIONS:
        return next((n for n in _operands(node) if isinstance(n, int) and n > choices), None)
    if node.target not in _SHIFTS:
        return None
    others = (n for n in _operands(node) if n not in counts and n not in known)
    return next((other for other in others if _is_bound(other)), None)


def _slice_limit(node: fx.Node) -> Any:
    """The end of a part of any number of rows; a count for each expert is a row for none."""
    arguments = schema_arguments(node)
    source, dim = arguments["self"], arguments["dim"]
    size = value(source).shape[dim]
    if source.target is aten.bincount.default or isinstance(size, int):
        return None
    ends = [end for end in (arguments["start"], arguments["end"]) if end != sys.maxsize]
    if not free_unbacked_symbols(size):
        ends = [end for end in ends if isinstance(end, int)]
    return next((end for end in ends if _is_bound(end)), None)


def _operands(node: fx.Node) -> list[Any]:
    """What a count may be compared with; dimensions and the like are none."""
    given = schema_arguments(node)
    return [given[name] for name in ("self", "other", "min", "max", "num_classes") if name in given]


def _is_bound(operand: Any) -> bool:
    """Whether it is a number beyond one, a size, or a tensor of such."""
    if isinstance(operand, fx.Node):
        result = value(operand)
        return (
            "zeros" not in str(operand.target) if isinstance(result, Tensor) else _is_bound(result)
        )
    if isinstance(operand, torch.SymInt):
        return not free_unbacked_symbols(operand)
    return isinstance(operand, (int, float)) and abs(operand) > 1

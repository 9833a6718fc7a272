"""What norms and attention cannot do without: where no match took it, the report says so."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from moe_compile.rewrite.normal_form import aten, schema_arguments, value

_ROOTS = {aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar}
_FUSED_NORMS = {aten.rms_norm.default, aten._fused_rms_norm.default}
_SELECTIONS = {aten.topk.default, aten.argmax.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default}
_BESIDE_THE_MEAN = {aten.add.Tensor, aten.to.dtype, aten.clamp.default, aten.clamp_min.default}
_BESIDE_THE_WEIGHTS = {
    aten.to.dtype,
    aten.dropout.default,
    aten.slice.Tensor,
    aten.mul.Tensor,
    aten.masked_fill.Scalar,
    aten.nan_to_num.default,
    aten.clone.default,
    aten.expand.default,
    aten.reshape.default,
    aten.transpose.int,
}


def is_norm(node: fx.Node) -> bool:
    """Whether it is a root of a mean over the last dimension."""
    if node.target not in _ROOTS or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.pow.Tensor_Scalar and node.args[1] != -0.5:
        return False
    means = _reached(node, lambda n: n.all_input_nodes, _BESIDE_THE_MEAN)
    return any(n.target is aten.mean.dim and _is_over_last(n) for n in means)


def is_fused_norm(node: fx.Node) -> bool:
    """Whether it is torch's own RMSNorm."""
    return node.target in _FUSED_NORMS


def is_attention(node: fx.Node) -> bool:
    """Whether it is torch's attention, or a softmax that weighs rows of a matrix product."""
    if node.target is aten.scaled_dot_product_attention.default:
        return True
    if node.target is not aten.softmax.int or not _is_over_last(node):
        return False
    return any(
        n.target in _PRODUCTS for n in _reached(node, lambda n: list(n.users), _BESIDE_THE_WEIGHTS)
    )


def is_selection(node: fx.Node) -> bool:
    """Whether it is a top-k, an argmax, or a maximum whose place somebody uses."""
    if node.target is aten.max.dim:
        return any(user.args[1:] == (1,) and user.users for user in node.users)
    return node.target in _SELECTIONS


def selects_positions(node: fx.Node) -> bool:
    """Whether a selection is among any number of things: positions of a sequence, not experts."""
    scores: Any = node.args[0]
    dim = schema_arguments(node)["dim"]
    return dim is not None and not isinstance(value(scores).shape[dim], int)


def _reached(
    node: fx.Node, beside: Callable[[fx.Node], list[fx.Node]], through: set[Any]
) -> Iterator[fx.Node]:
    """What is next to a node, also behind operations that are passed through."""
    seen, todo = set[fx.Node](), beside(node)
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if current.target in through:
            todo += beside(current)


def _is_over_last(node: fx.Node) -> bool:
    source = value(node.all_input_nodes[0])
    dims = schema_arguments(node)["dim"]
    dims = [dims] if isinstance(dims, int) else dims
    return isinstance(source, Tensor) and [dim % source.dim() for dim in dims] == [source.dim() - 1]

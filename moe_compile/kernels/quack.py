"""Products of groups of rows on Hopper by quack's kernels, which gather rows as they load them.

    quack_product(x, w, ends, tokens)[r]         = x[tokens[r]] @ w[e]
    quack_weight_grad(x, rows, ends, tokens)[e]  = sum over r of x[tokens[r]] outer rows[r]

where ends[e] <= r < ends[e + 1];

    spread_product(x, w, where)     = quack_product(x, w, ..)                  [T, A] to [P, B]
    product_collect(rows, w, where) = collect_rows(quack_product(rows, w, ..)) [P, A] to [T, B]

The last two are each other's adjoint, so no gradient needs more than these products: neither the
rows of the tokens nor those of their gradients are ever written out. Nothing waits for the device,
and one compiled kernel serves any number of rows and groups.
"""

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.kernels.activation import activate, activate_backward
from moe_compile.kernels.expert_rows import collect_rows
from moe_compile.kernels.quack_tiles import Tile, product_tile, weight_tile


def library() -> Any:
    """`quack.gemm`, of an optional dependency that is loaded when first needed."""
    return importlib.import_module("quack.gemm")


class Where(NamedTuple):
    """Which rows are whose: all of it int32, and fresh or contiguous.

    picks: K. tokens: [P], the token of each row. ends: [E + 1], zero and where each expert's rows
    end. order, inverse, offs: from `expert_rows.group_picks`.
    """

    picks: int
    tokens: Tensor
    ends: Tensor
    order: Tensor
    inverse: Tensor
    offs: Tensor


def where_rows_are(picks: int, order: Tensor, inverse: Tensor, offs: Tensor) -> Where:
    """Of what `group_picks` gives."""
    return Where(picks, order // picks, F.pad(offs, (1, 0)), order, inverse, offs)


@torch.library.custom_op("moe_compile::quack_product", mutates_args=())
def quack_product(
    x: Tensor, w: Tensor, ends: Tensor, tokens: Tensor | None, transposed: bool
) -> Tensor:
    """Multiply each group of rows by its matrix.

    Args:
        x: [T, A], or [P, A] without `tokens`; bfloat16.
        w: [E, A, B], or [E, B, A] when `transposed`; A and B are multiples of 8.
        ends: [E + 1] int32.
        tokens: [P] int32, the row of x that each row is, if they are not the same.
        transposed: How w is stored.

    Returns:
        [P, B], fresh and contiguous; from ends[-1] on it may hold anything.
    """
    matrices = w if transposed else w.mT
    num_rows = (x if tokens is None else tokens).shape[0]
    out = x.new_empty(num_rows, matrices.shape[1])
    if num_rows:
        columns, depth = matrices.shape[1:]
        tile = product_tile(num_rows // w.shape[0], columns, depth, tokens is not None)
        _gemm(_by_rows(x), _loadable(matrices), out, tile, cu_seqlens_m=ends, A_idx=tokens)
    return out


@torch.library.custom_op("moe_compile::quack_weight_grad", mutates_args=())
def quack_weight_grad(
    x: Tensor, rows: Tensor, ends: Tensor, tokens: Tensor | None, transposed: bool
) -> Tensor:
    """The gradient of a weight that turned one of x[tokens] and rows into the other.

    Args:
        x: [T, A], or [P, A] without `tokens`; bfloat16.
        rows: [P, B].
        ends, tokens: as in `quack_product`.
        transposed: How the gradient is stored.

    Returns:
        [E, A, B], or [E, B, A] when `transposed`, fresh and contiguous; zero for a group without
        rows.
    """
    num_groups, sizes = ends.shape[0] - 1, (x.shape[1], rows.shape[1])
    shape = (num_groups, *(reversed(sizes) if transposed else sizes))
    if not rows.shape[0]:
        return x.new_zeros(shape)
    out = x.new_empty(shape)
    target = out.mT if transposed else out
    operands = _by_rows(x).mT, _by_rows(rows).mT, target
    _gemm(*operands, weight_tile(*sizes), cu_seqlens_k=ends, A_idx=tokens)
    return out


@quack_product.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor, tokens: Tensor | None, transposed: bool) -> Tensor:
    rows = x if tokens is None else tokens
    return x.new_empty(rows.shape[0], w.shape[1 if transposed else 2])


@quack_weight_grad.register_fake
def _(x: Tensor, rows: Tensor, ends: Tensor, tokens: Tensor | None, transposed: bool) -> Tensor:
    sizes = (x.shape[1], rows.shape[1])
    return x.new_empty(ends.shape[0] - 1, *(reversed(sizes) if transposed else sizes))


def _gemm(a: Tensor, b: Tensor, out: Tensor, tile: Tile, **groups: Tensor | None) -> None:
    """out = a @ b.mT of each group; for weights, the groups are of the columns of a and b."""
    sizes = tile.rows, tile.columns, *tile.cluster
    library().gemm(a, b, out, None, None, *sizes, pingpong=tile.pingpong, **groups)


def _by_rows(x: Tensor) -> Tensor:
    return _loadable(x.contiguous())


def _loadable(t: Tensor) -> Tensor:
    """`t`, or a copy where its address or its strides are none that the device copies tiles from.

    Of matrices, either dimension may be the dense one.
    """
    *outer, row, column = t.stride()
    strides = (*outer, row if column == 1 else column)
    is_dense = 1 in (row, column) and all(stride % 8 == 0 for stride in strides)
    if is_dense and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _weight_grad(x: Tensor, rows: Tensor, w: Tensor, where: Where, transposed: bool) -> Tensor:
    """In the layout of w: autograd would copy any other one into the parameter's gradient."""
    is_view = w.stride(-1) != 1
    grad = quack_weight_grad(x, rows, where.ends, where.tokens, transposed != is_view)
    return grad.mT if is_view else grad


class _SpreadProduct(torch.autograd.Function):
    """`spread_product`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, transposed: bool, picks: int, *indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, w, *indices)
        ctx.transposed, ctx.picks = transposed, picks
        where = Where(picks, *indices)
        return quack_product(x, w, where.ends, where.tokens, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *indices = ctx.saved_tensors
        where, grad = Where(ctx.picks, *indices), grads[0].contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _collected(grad, w, where, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            grad_w = _weight_grad(x, grad, w, where, ctx.transposed)
        return grad_x, grad_w, *[None] * 7


class _ProductCollect(torch.autograd.Function):
    """`product_collect`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, w: Tensor, transposed: bool, picks: int, *indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, w, *indices)
        ctx.transposed, ctx.picks = transposed, picks
        return _collected(rows, w, Where(picks, *indices), transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, *indices = ctx.saved_tensors
        where, grad = Where(ctx.picks, *indices), grads[0].contiguous()
        grad_rows = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_rows = quack_product(grad, w, where.ends, where.tokens, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            # What is gathered are the gradients, and they are the weight's other side.
            grad_w = _weight_grad(grad, rows, w, where, not ctx.transposed)
        return grad_rows, grad_w, *[None] * 7


class _WeighedProductCollect(torch.autograd.Function):
    """`weighed_product_collect`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        w: Tensor,
        key: str,
        transposed: bool,
        picks: int,
        *indices: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, w, *indices)
        ctx.key, ctx.transposed, ctx.picks = key, transposed, picks
        where = Where(picks, *indices)
        return _collected(activate(rows, weight, where.offs, key), w, where, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, w, *indices = ctx.saved_tensors
        where, grad = Where(ctx.picks, *indices), grads[0].contiguous()
        outer = quack_product(grad, w, where.ends, where.tokens, not ctx.transposed)
        given = outer, rows, weight, where.offs, ctx.key, ctx.needs_input_grad[2]
        grad_rows, grad_weight, weighed = activate_backward(*given)
        grad_w = None
        if ctx.needs_input_grad[2]:
            grad_w = _weight_grad(grad, weighed, w, where, not ctx.transposed)
        return grad_rows, grad_weight, grad_w, *[None] * 8


def _collected(rows: Tensor, w: Tensor, where: Where, transposed: bool) -> Tensor:
    products = quack_product(rows, w, where.ends, None, transposed)
    return collect_rows(products, where.order, where.inverse, where.offs, where.picks)


def spread_product(x: Tensor, w: Tensor, where: Where, transposed: bool) -> Tensor:
    """A row for each pick, times its expert's matrix.

    Args:
        x: [T, A] bfloat16.
        w: [E, A, B], or [E, B, A] when `transposed`.
        where: which rows are whose.
        transposed: How w is stored.

    Returns:
        [P, B]; from offs[-1] on it may hold anything, and so may its gradient.
    """
    picks, *indices = where
    out: Tensor = _SpreadProduct.apply(x, w, transposed, picks, *indices)
    return out


def product_collect(rows: Tensor, w: Tensor, where: Where, transposed: bool) -> Tensor:
    """Each token's sum of its rows, each times its expert's matrix.

    Args: as of `spread_product`, but rows: [P, A].

    Returns: [T, B].
    """
    picks, *indices = where
    out: Tensor = _ProductCollect.apply(rows, w, transposed, picks, *indices)
    return out


def weighed_product_collect(
    rows: Tensor, weight: Tensor, key: str, w: Tensor, where: Where, transposed: bool
) -> Tensor:
    """`product_collect` of activation(rows) * weight, which is not kept for the backward.

    Its gradient's kernel computes it anyhow. So a block keeps the tokens and `rows` alone.

    Args: as of `product_collect`, but rows: [P, N]. weight: [P, 1]. key: of the activation.
    """
    picks, *indices = where
    out: Tensor = _WeighedProductCollect.apply(rows, weight, w, key, transposed, picks, *indices)
    return out

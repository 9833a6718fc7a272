"""Products of groups of rows on Hopper by quack's kernels, which gather rows as they load them.

    quack_product(x, w, ends, tokens)[r]         = x[tokens[r]] @ w[e]
    quack_weight_grad(x, rows, ends, tokens)[e]  = sum over r of x[tokens[r]] outer rows[r]

where ends[e] <= r < ends[e + 1]. An experts block (`expert_block.py`) needs no others, so
neither the rows of the tokens nor those of their gradients are ever written out. Nothing waits for
the device, and one compiled kernel serves any number of rows and groups.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.kernels.expert_block import Picked, Products, Where, register_products
from moe_compile.kernels.quack_tiles import Tile, product_tile, weight_tile

NAME = "quack"


def library() -> Any:
    """`quack.gemm`, of an optional dependency that is loaded when first needed."""
    return importlib.import_module("quack.gemm")


def where_rows_are(picks: int, order: Tensor, inverse: Tensor, offs: Tensor) -> Where:
    """Of what `group_picks` gives, with the token of each row, [P], and the ends, zero first."""
    return Where(picks, order, inverse, offs, order // picks, F.pad(offs, (1, 0)))


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


def _gather(x: Tensor, where: Where, after: Tensor | None) -> Picked:
    return x, where.tokens


def _product(rows: Picked, w: Tensor, where: Where, transposed: bool) -> Tensor:
    assert where.ends is not None
    return quack_product(rows[0], w, where.ends, rows[1], transposed)


def _weight_grad(rows: Picked, others: Tensor, where: Where, transposed: bool) -> Tensor:
    assert where.ends is not None
    return quack_weight_grad(rows[0], others, where.ends, rows[1], transposed)


register_products(NAME, Products(where_rows_are, _gather, _product, _weight_grad))

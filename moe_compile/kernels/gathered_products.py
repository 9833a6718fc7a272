"""Products of groups of rows that gather the tokens' rows while they multiply, in Triton.

    gathered_product(x, w, order, offs)[r]         = x[order[r] // K] @ w[e]
    gathered_weight_grad(x, rows, order, offs)[e]  = sum over r of x[order[r] // K] outer rows[r]

where offs[e - 1] <= r < offs[e]. Neither the rows of the tokens nor those of their gradients are
ever written out, nothing waits for the device, and sums are in a fixed order.
"""

import torch
from torch import Tensor

from moe_compile.kernels.expert_block import Picked, Products, Where, register_products
from moe_compile.kernels.expert_rows import spread_meaning
from moe_compile.kernels.grouped_mm import grouped_mm, grouped_mm_weight_grad
from moe_compile.kernels.visible import Wrap, as_it_is, show_kernels

NAME = "triton"


@torch.library.custom_op("moe_compile::gathered_product", mutates_args=())
def gathered_product(
    x: Tensor, w: Tensor, order: Tensor | None, offs: Tensor, picks: int, transposed: bool
) -> Tensor:
    """Multiply each group of rows by its matrix.

    Args:
        x: [T, A], or [P, A] without `order`.
        w: [E, A, B] in any strides, or [E, B, A] when `transposed`.
        order: [P] int32, the pick of each row, if x has a row for each token.
        offs: [E] int32, where each group's rows end.
        picks: K.
        transposed: How w is stored.

    Returns:
        [P, B], fresh and contiguous; from offs[-1] on it may hold anything.
    """
    if x.is_cuda:
        return _product_on_gpu(x, w, order, offs, picks, transposed)
    rows = x if order is None else spread_meaning(x, order, picks)
    return grouped_mm(rows, w, offs, transposed)


@torch.library.custom_op("moe_compile::gathered_weight_grad", mutates_args=())
def gathered_weight_grad(
    x: Tensor, rows: Tensor, order: Tensor | None, offs: Tensor, picks: int, transposed: bool
) -> Tensor:
    """The gradient of a weight that turned one of x's rows and `rows` into the other.

    Args:
        x: [T, A], or [P, A] without `order`.
        rows: [P, B].
        order, offs, picks: as in `gathered_product`.
        transposed: How the gradient is stored.

    Returns:
        [E, A, B], or [E, B, A] when `transposed`, fresh and contiguous; zero for a group without
        rows.
    """
    if x.is_cuda:
        return _weight_grad_on_gpu(x, rows, order, offs, picks, transposed)
    own = x if order is None else spread_meaning(x, order, picks)
    pair = (rows, own) if transposed else (own, rows)
    return grouped_mm_weight_grad(*pair, offs)


def _product_on_gpu(
    x: Tensor,
    w: Tensor,
    order: Tensor | None,
    offs: Tensor,
    picks: int,
    transposed: bool,
    *,
    wrap: Wrap = as_it_is,
) -> Tensor:
    from moe_compile.kernels import gathered_products_kernels as kernels  # needs Triton

    return kernels.product(x, w.mT if transposed else w, order, offs, picks, wrap=wrap)


def _weight_grad_on_gpu(
    x: Tensor,
    rows: Tensor,
    order: Tensor | None,
    offs: Tensor,
    picks: int,
    transposed: bool,
    *,
    wrap: Wrap = as_it_is,
) -> Tensor:
    from moe_compile.kernels import gathered_products_kernels as kernels

    return kernels.weight_grad(x, rows, order, offs, picks, transposed, wrap=wrap)


show_kernels(gathered_product, _product_on_gpu)
show_kernels(gathered_weight_grad, _weight_grad_on_gpu)


@gathered_product.register_fake
def _(
    x: Tensor, w: Tensor, order: Tensor | None, offs: Tensor, picks: int, transposed: bool
) -> Tensor:
    rows = x if order is None else order
    return x.new_empty(rows.shape[0], w.shape[1 if transposed else 2])


@gathered_weight_grad.register_fake
def _(
    x: Tensor, rows: Tensor, order: Tensor | None, offs: Tensor, picks: int, transposed: bool
) -> Tensor:
    sizes = (x.shape[1], rows.shape[1])
    return x.new_empty(offs.shape[0], *(reversed(sizes) if transposed else sizes))


def _gather(x: Tensor, where: Where, after: Tensor | None) -> Picked:
    return x, where.order


def _product(rows: Picked, w: Tensor, where: Where, transposed: bool) -> Tensor:
    return gathered_product(rows[0], w, rows[1], where.offs, where.picks, transposed)


def _weight_grad(rows: Picked, others: Tensor, where: Where, transposed: bool) -> Tensor:
    x, order = rows
    return gathered_weight_grad(x, others, order, where.offs, where.picks, transposed)


register_products(NAME, Products(Where, _gather, _product, _weight_grad))

"""An experts block as products of groups of rows, which keeps its tokens and its pre-activation.

    spread_product(x, w)        = product(gather(x), w)                         [T, A] to [P, B]
    product_collect(rows, w)    = collect_rows(product(rows, w))                [P, A] to [T, B]
    weighed_product_collect     = product_collect(activation(rows) * weight, w)

The first two are each other's adjoint. Neither gathered rows nor the weighed activation are kept
for the backward: it gathers again, and the kernel of the activation's gradient has computed the
activation anyhow. The idea is that of SonicMoE (arXiv:2512.14080).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_compile.kernels.activation import activate, activate_backward
from moe_compile.kernels.expert_parts import (
    arrange_weights,
    bias_rows,
    bias_sums,
    experts_of_rows,
    kernels_of,
)
from moe_compile.kernels.expert_rows import collect_rows, group_picks


class Where(NamedTuple):
    """Which rows are whose: `picks` is K, the next three are from `expert_rows.group_picks`.

    tokens, ends: of products that gather while they multiply (`kernels/quack.py`).
    """

    picks: int
    order: Tensor
    inverse: Tensor
    offs: Tensor
    tokens: Tensor | None = None
    ends: Tensor | None = None


Picked = tuple[Tensor, Tensor | None]
"""Rows as they are; or those of the tokens that the second names."""


class Products(NamedTuple):
    """How rows are gathered and multiplied.

    locate(picks, order, inverse, offs): the `Where`.
    gather(x, where, after): the rows of x[T, A], a row for each pick, [P, A]; with `after`, a
        gradient, nothing that was gathered before is taken instead, so nothing need be kept.
    product(rows, w, where, transposed): each group of rows times its matrix of w[E, A, B], or of
        w[E, B, A] when `transposed`: [P, B], whose rows from offs[-1] on may hold anything.
    weight_grad(rows, others, where, transposed): the gradient of such a w, fresh and contiguous, of
        [P, A] and [P, B]; zero for a group without rows.
    """

    locate: Callable[[int, Tensor, Tensor, Tensor], Where]
    gather: Callable[[Tensor, Where, Tensor | None], Picked]
    product: Callable[[Picked, Tensor, Where, bool], Tensor]
    weight_grad: Callable[[Picked, Tensor, Where, bool], Tensor]


_PRODUCTS: dict[str, Products] = {}


def register_products(name: str, products: Products) -> None:
    """Makes products known by a name, since a traced function takes no functions."""
    _PRODUCTS[name] = products


def sum_of_experts(
    products: str,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    transposed: bool = False,
    places: Tensor | None = None,
) -> Tensor:
    """`ops.experts` without a norm, of weights that come after the activation; by `products`."""
    num_experts, picks = up.shape[0], ids.shape[1]
    num_rows = None if places is None else places.shape[0]
    grouped = order, _, offs = group_picks(ids, num_experts, num_rows)
    where = _PRODUCTS[products].locate(picks, *grouped)
    weight = arrange_weights(weights, *grouped)
    rows = spread_product(products, x.to(up.dtype), up, where, not transposed)
    if up_bias is not None:
        rows = rows + bias_rows(up_bias, experts_of_rows(ids, num_experts, order), offs)
    key = kernels_of(activation, rows)
    if key is None:
        weighed = (activation(rows) * weight).to(down.dtype)
        out = product_collect(products, weighed, down, where, not transposed)
    else:
        out = weighed_product_collect(products, rows, weight, key, down, where, not transposed)
    if down_bias is not None:
        out = out + bias_sums(down_bias, ids, weights)
    return out.to(x.dtype)


def spread_product(products: str, x: Tensor, w: Tensor, where: Where, transposed: bool) -> Tensor:
    """A row for each pick, times its expert's matrix.

    Args:
        products: the name of some.
        x: [T, A].
        w: [E, A, B], or [E, B, A] when `transposed`.
        where: which rows are whose.
        transposed: How w is stored.

    Returns:
        [P, B]; from offs[-1] on it may hold anything, and so may its gradient.
    """
    out: Tensor = _SpreadProduct.apply(x, w, products, transposed, *where)
    return out


def product_collect(
    products: str, rows: Tensor, w: Tensor, where: Where, transposed: bool
) -> Tensor:
    """Each token's sum of its rows, each times its expert's matrix.

    Args: as of `spread_product`, but rows: [P, A].

    Returns: [T, B].
    """
    out: Tensor = _ProductCollect.apply(rows, w, products, transposed, *where)
    return out


def weighed_product_collect(
    products: str,
    rows: Tensor,
    weight: Tensor,
    key: str,
    w: Tensor,
    where: Where,
    transposed: bool,
) -> Tensor:
    """`product_collect` of activation(rows) * weight, which is not kept for the backward.

    Args: as of `product_collect`, but rows: [P, N]. weight: [P, 1]. key: of the activation.
    """
    given = rows, weight, w, key, products, transposed
    out: Tensor = _WeighedProductCollect.apply(*given, *where)
    return out


def _keep(ctx: Any, tensors: tuple[Tensor, ...], where: Where) -> None:
    picks, *indices = where
    ctx.save_for_backward(*tensors, *indices)
    ctx.picks, ctx.count = picks, len(tensors)


def _kept(ctx: Any) -> tuple[tuple[Tensor, ...], Where]:
    saved = ctx.saved_tensors
    return saved[: ctx.count], Where(ctx.picks, *saved[ctx.count :])


def _collected(
    products: Products, rows: Tensor, w: Tensor, where: Where, transposed: bool
) -> Tensor:
    out = products.product((rows, None), w, where, transposed)
    return collect_rows(out, where.order, where.inverse, where.offs, where.picks)


def _weight_grad(
    products: Products, rows: Picked, others: Tensor, w: Tensor, where: Where, transposed: bool
) -> Tensor:
    """In the layout of w: autograd would copy any other one into the parameter's gradient."""
    is_view = w.stride(-1) != 1
    grad = products.weight_grad(rows, others, where, transposed != is_view)
    return grad.mT if is_view else grad


class _SpreadProduct(torch.autograd.Function):
    """`spread_product`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, products: str, transposed: bool, *where: Any
    ) -> Tensor:
        ctx.products, ctx.transposed = products, transposed
        found, by = Where(*where), _PRODUCTS[products]
        _keep(ctx, (x, w), found)
        return by.product(by.gather(x, found, None), w, found, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), where = _kept(ctx)
        by, grad = _PRODUCTS[ctx.products], grads[0].contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _collected(by, grad, w, where, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            rows = by.gather(x, where, grad)
            grad_w = _weight_grad(by, rows, grad, w, where, ctx.transposed)
        return grad_x, grad_w, *[None] * 8


class _ProductCollect(torch.autograd.Function):
    """`product_collect`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, w: Tensor, products: str, transposed: bool, *where: Any
    ) -> Tensor:
        ctx.products, ctx.transposed = products, transposed
        found = Where(*where)
        _keep(ctx, (rows, w), found)
        return _collected(_PRODUCTS[products], rows, w, found, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, w), where = _kept(ctx)
        by = _PRODUCTS[ctx.products]
        upstream = by.gather(grads[0].contiguous(), where, None)
        grad_rows = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_rows = by.product(upstream, w, where, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            # What is gathered are the gradients, and they are the weight's other side.
            grad_w = _weight_grad(by, upstream, rows, w, where, not ctx.transposed)
        return grad_rows, grad_w, *[None] * 8


class _WeighedProductCollect(torch.autograd.Function):
    """`weighed_product_collect`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        w: Tensor,
        key: str,
        products: str,
        transposed: bool,
        *where: Any,
    ) -> Tensor:
        ctx.key, ctx.products, ctx.transposed = key, products, transposed
        found = Where(*where)
        _keep(ctx, (rows, weight, w), found)
        weighed = activate(rows, weight, found.offs, key)
        return _collected(_PRODUCTS[products], weighed, w, found, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight, w), where = _kept(ctx)
        by = _PRODUCTS[ctx.products]
        upstream = by.gather(grads[0].contiguous(), where, None)
        outer = by.product(upstream, w, where, not ctx.transposed)
        given = outer, rows, weight, where.offs, ctx.key, ctx.needs_input_grad[2]
        grad_rows, grad_weight, weighed = activate_backward(*given)
        grad_w = None
        if ctx.needs_input_grad[2]:
            grad_w = _weight_grad(by, upstream, weighed, w, where, not ctx.transposed)
        return grad_rows, grad_weight, grad_w, *[None] * 9

"""Tokens to a row for each pick, in the experts' order, and back: what surrounds the products.

    order, inverse, offs = group_picks(ids, E)
    rows[r]  = x[order[r] // K]                       spread_rows
    out[t]   = sum over k of rows[inverse[t K + k]]   collect_rows

Each of the two is the other's adjoint, so neither backward adds row by row in any order, as
autograd's own backward of a gather does. Rows of picks that live elsewhere, whose id is -1, come
last: from `offs[-1]` on they may hold anything, NaN too, and no sum has them.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.kernels.visible import Wrap, as_it_is, show_kernels


@torch.library.custom_op("moe_compile::group_picks", mutates_args=())
def group_picks(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort picks by expert, each expert's in order.

    Args:
        ids: [T, K] of integers in -1..E-1.
        num_experts: E.

    Returns:
        order [T K] int32, the pick of each row; inverse [T K] int32, the row of each pick; and
        offs [E] int32, where each expert's rows end.
    """
    if ids.is_cuda:
        return _group_on_gpu(ids, num_experts)
    # -1 becomes E, which sorts last.
    expert, order = (ids.flatten() % (num_experts + 1)).sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    offs = torch.searchsorted(expert, torch.arange(num_experts, dtype=ids.dtype), right=True)
    return order.int(), inverse.int(), offs.int()


@torch.library.custom_op("moe_compile::spread_rows", mutates_args=())
def spread_rows(x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    """A row for each pick.

    Args:
        x: [T, H].
        order, inverse, offs: from `group_picks`.
        picks: K.

    Returns:
        [T K, H], fresh and contiguous; from offs[-1] on it may hold anything.
    """
    if x.is_cuda:
        return _spread_on_gpu(x, order, inverse, offs, picks)
    return spread_meaning(x, order, picks)


def spread_meaning(x: Tensor, order: Tensor, picks: int) -> Tensor:
    """`spread_rows` in torch."""
    return x.index_select(0, order // picks)


@torch.library.custom_op("moe_compile::collect_rows", mutates_args=())
def collect_rows(rows: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    """Each token's sum.

    Args:
        rows: [T K, H].
        order, inverse, offs: from `group_picks`.
        picks: K.

    Returns:
        [T, H] in the rows' dtype, fresh and contiguous; summed in float32, if that is wider.
    """
    if rows.is_cuda:
        return _collect_on_gpu(rows, order, inverse, offs, picks)
    return collect_meaning(rows, inverse, offs, picks)


def collect_meaning(rows: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    """`collect_rows` in torch."""
    is_real = (inverse < offs[-1])[:, None]
    own = torch.where(is_real, rows.index_select(0, inverse), 0)
    return own.view(-1, picks, rows.shape[1]).sum(dim=1)


def _group_on_gpu(
    ids: Tensor, num_experts: int, *, wrap: Wrap = as_it_is
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_compile.kernels import row_kernels  # needs Triton

    return row_kernels.group_picks(ids, num_experts, wrap=wrap)


def _spread_on_gpu(
    x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int, *, wrap: Wrap = as_it_is
) -> Tensor:
    from moe_compile.kernels import row_kernels

    return row_kernels.spread(x, inverse, offs, picks, wrap=wrap)


def _collect_on_gpu(
    rows: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int, *, wrap: Wrap = as_it_is
) -> Tensor:
    from moe_compile.kernels import row_kernels

    if rows.dtype == torch.float64:
        return collect_meaning(rows, inverse, offs, picks)
    return row_kernels.collect(rows, inverse, offs, picks, wrap=wrap)


show_kernels(group_picks, _group_on_gpu)
show_kernels(spread_rows, _spread_on_gpu)
show_kernels(collect_rows, _collect_on_gpu)


@group_picks.register_fake
def _(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse = (ids.new_empty(ids.numel(), dtype=torch.int32) for _ in range(2))
    return order, inverse, ids.new_empty(num_experts, dtype=torch.int32)


@spread_rows.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@collect_rows.register_fake
def _(rows: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    return rows.new_empty(order.shape[0] // picks, rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    _, *indices, ctx.picks = inputs
    ctx.save_for_backward(*indices)


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return collect_rows(grad, *ctx.saved_tensors, ctx.picks), None, None, None, None


def _collect_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return spread_rows(grad, *ctx.saved_tensors, ctx.picks), None, None, None, None


spread_rows.register_autograd(_spread_backward, setup_context=_save)
collect_rows.register_autograd(_collect_backward, setup_context=_save)

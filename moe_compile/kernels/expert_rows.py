"""Tokens to a row for each pick, in the experts' order, and back: what surrounds the products.

    order, inverse, offs = group_picks(ids, E, P)
    rows[r]  = x[order[r] // K]                       spread_rows
    out[t]   = sum over k of rows[inverse[t K + k]]   collect_rows

Each of the two is the other's adjoint, so neither backward adds row by row in any order, as
autograd's own backward of a gather does. Picks that live elsewhere, whose id is -1, come last. Of
all T K there are P rows, where no more than P are here: from `offs[-1]` on they may hold anything,
NaN too, and no sum has them.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.kernels.visible import Wrap, as_it_is, show_kernels


@torch.library.custom_op("moe_compile::group_picks", mutates_args=())
def group_picks(
    ids: Tensor, num_experts: int, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort picks by expert, each expert's in order.

    Args:
        ids: [T, K] of integers in -1..E-1.
        num_experts: E.
        num_rows: P, if it is less than T K: no more than P of the ids are other than -1. It may be
            0 where T is.

    Returns:
        order [P] int32, the pick of each row; inverse [T K] int32, the row of each pick, which is P
        or more for some that live elsewhere; and offs [E] int32, where each expert's rows end.
    """
    if ids.is_cuda:
        return _group_on_gpu(ids, num_experts, num_rows)
    # -1 becomes E, which sorts last.
    expert, order = (ids.flatten() % (num_experts + 1)).sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    offs = torch.searchsorted(expert, torch.arange(num_experts, dtype=ids.dtype), right=True)
    return order[:num_rows].int(), inverse.int(), offs.int()


@torch.library.custom_op("moe_compile::spread_rows", mutates_args=())
def spread_rows(x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    """A row for each pick.

    Args:
        x: [T, H].
        order, inverse, offs: from `group_picks`.
        picks: K.

    Returns:
        [P, H], fresh and contiguous; from offs[-1] on it may hold anything.
    """
    if x.is_cuda:
        return _spread_on_gpu(x, order, inverse, offs, picks)
    return spread_meaning(x, order, picks)


@torch.library.custom_op("moe_compile::spread_rows_again", mutates_args=())
def spread_rows_again(
    x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int, after: Tensor
) -> Tensor:
    """`spread_rows` for a backward whose forward did not keep them.

    Args: as of `spread_rows`. after: what is only there in the backward, and not read: else a
        compiler could spread the rows in the forward, and keep them.
    """
    return spread_rows(x, order, inverse, offs, picks)


def spread_meaning(x: Tensor, order: Tensor, picks: int) -> Tensor:
    """`spread_rows` in torch."""
    return x.index_select(0, order // picks)


@torch.library.custom_op("moe_compile::collect_rows", mutates_args=())
def collect_rows(rows: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    """Each token's sum.

    Args:
        rows: [P, H].
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
    own, is_real = rows_of_picks(rows, inverse, offs)
    return torch.where(is_real, own, 0).view(-1, picks, rows.shape[1]).sum(dim=1)


def rows_of_picks(rows: Tensor, inverse: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each pick, [T K, H], and whether it is one, [T K, 1]: else it is any row."""
    own = rows.index_select(0, inverse.clamp(max=rows.shape[0] - 1))
    return own, (inverse < offs[-1])[:, None]


def _group_on_gpu(
    ids: Tensor, num_experts: int, num_rows: int | None = None, *, wrap: Wrap = as_it_is
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_compile.kernels import row_kernels  # needs Triton

    return row_kernels.group_picks(ids, num_experts, num_rows, wrap=wrap)


def _spread_on_gpu(
    x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int, *, wrap: Wrap = as_it_is
) -> Tensor:
    from moe_compile.kernels import row_kernels

    return row_kernels.spread(x, order.shape[0], inverse, offs, picks, wrap=wrap)


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
def _(ids: Tensor, num_experts: int, num_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ids.numel() if num_rows is None else num_rows, ids.numel(), num_experts
    order, inverse, offs = (ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return order, inverse, offs


@spread_rows.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@spread_rows_again.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int, after: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@collect_rows.register_fake
def _(rows: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    return rows.new_empty(inverse.shape[0] // picks, rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    _, *indices, ctx.picks = inputs
    ctx.save_for_backward(*indices)


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return collect_rows(grad, *ctx.saved_tensors, ctx.picks), None, None, None, None


def _collect_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return spread_rows(grad, *ctx.saved_tensors, ctx.picks), None, None, None, None


spread_rows.register_autograd(_spread_backward, setup_context=_save)
collect_rows.register_autograd(_collect_backward, setup_context=_save)

"""The Triton kernels of `gathered_products`; imported where there is a GPU.

Both are deterministic: a program owns its tile, and adds up in order.
"""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.row_kernels import at_least_one
from moe_compile.kernels.visible import Wrap, as_it_is


class Tile(NamedTuple):
    """What a program computes, how deep it loads at once, and how it is started."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The fastest of a sweep on an H200, at Qwen3-30B-A3B's sizes.
_LARGE = Tile(128, 256, 64, 8, 3)
_SMALL = Tile(64, 128, 64, 4, 3)
_WEIGHT = Tile(128, 128, 64, 4, 4)


@triton.jit
def _product(
    x,
    w,
    order,
    offs,
    out,
    groups,
    to_group,
    to_depth,
    to_column,
    depth: tl.constexpr,
    columns: tl.constexpr,
    picks: tl.constexpr,
    gathers: tl.constexpr,
    bins: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    inner: tl.constexpr,
):
    """A tile of `rows` rows of one group and `block` columns; programs beyond the last have none.

    Tiles are counted group by group, by how many each needs for its rows.
    """
    tile, at = tl.program_id(1), tl.arange(0, bins)
    ends = tl.load(offs + at, mask=at < groups, other=0)
    starts = tl.load(offs + at - 1, mask=(at > 0) & (at < groups), other=0)
    counts = tl.where(at < groups, (ends - starts + rows - 1) // rows, 0)
    last_tiles = tl.cumsum(counts, 0)
    group = tl.sum((last_tiles <= tile).to(tl.int32), axis=0)
    if group >= groups:
        return
    is_own = at == group
    end = tl.sum(tl.where(is_own, ends, 0), axis=0)
    first = tl.sum(tl.where(is_own, starts + (tile - last_tiles + counts) * rows, 0), axis=0)
    row = first + tl.arange(0, rows)
    inside = (row < end)[:, None]
    source = tl.load(order + row, mask=row < end, other=0) // picks if gathers else row % end
    column = tl.program_id(0) * block + tl.arange(0, block)
    own = column % columns  # what is not there may be anything that can be read
    deep = tl.arange(0, inner)
    left = x + source.to(tl.int64)[:, None] * depth + deep[None, :]
    matrix = w + group.to(tl.int64) * to_group
    right = matrix + deep[:, None] * to_depth + own[None, :] * to_column
    total = tl.zeros([rows, block], tl.float32)
    for start in range(0, depth, inner):
        if depth % inner == 0:
            a, b = tl.load(left + start), tl.load(right + start * to_depth)
        else:
            is_deep = start + deep < depth
            a = tl.load(left + start, mask=is_deep[None, :], other=0.0)
            b = tl.load(right + start * to_depth, mask=is_deep[:, None], other=0.0)
        total = tl.dot(a, b, total)
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside & (column < columns)[None, :])


@triton.jit
def _weight_grad(
    left,
    right,
    order,
    offs,
    out,
    height: tl.constexpr,
    width: tl.constexpr,
    picks: tl.constexpr,
    gathers_left: tl.constexpr,
    gathers_right: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    inner: tl.constexpr,
):
    """A tile of one group's left.T @ right."""
    group = tl.program_id(2)
    start = tl.load(offs + group - 1, mask=group > 0, other=0)
    end = tl.load(offs + group)
    at = tl.program_id(1) * rows + tl.arange(0, rows)
    column = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros([rows, block], tl.float32)
    for first in range(start, end, inner):
        row = first + tl.arange(0, inner)
        is_row = row < end
        row = tl.minimum(row, end - 1)
        source = tl.load(order + row) // picks if gathers_left or gathers_right else row
        own = (source if gathers_left else row).to(tl.int64)[:, None] * height
        other = (source if gathers_right else row).to(tl.int64)[:, None] * width
        a = tl.load(left + own + (at % height)[None, :], mask=is_row[:, None], other=0.0)
        b = tl.load(right + other + (column % width)[None, :])
        total = tl.dot(tl.trans(a), b, total)
    place = out + (group.to(tl.int64) * height + at[:, None]) * width + column[None, :]
    inside = (at < height)[:, None] & (column < width)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def product(
    x: Tensor,
    w: Tensor,
    order: Tensor | None,
    offs: Tensor,
    picks: int,
    *,
    wrap: Wrap = as_it_is,
) -> Tensor:
    """`gathered_products.gathered_product` of w[E, A, B] on a GPU."""
    groups, depth, columns = w.shape
    num_rows = (x if order is None else order).shape[0]
    out = x.new_empty(num_rows, columns)
    tile = _LARGE if num_rows >= _LARGE.rows * groups else _SMALL
    row_tiles = at_least_one((num_rows + tile.rows - 1) // tile.rows + groups)
    grid = triton.cdiv(columns, tile.columns), row_tiles
    given = x.contiguous(), w, offs if order is None else order, offs, out
    sizes = groups, *w.stride(), depth, columns, picks, order is not None
    bins = triton.next_power_of_2(groups)
    blocks = bins, tile.rows, tile.columns, tile.depth
    wrap(_product)[grid](*given, *sizes, *blocks, num_warps=tile.warps, num_stages=tile.stages)
    return out


def weight_grad(
    x: Tensor,
    rows: Tensor,
    order: Tensor | None,
    offs: Tensor,
    picks: int,
    transposed: bool,
    *,
    wrap: Wrap = as_it_is,
) -> Tensor:
    """`gathered_products.gathered_weight_grad` on a GPU."""
    gathers = order is not None
    sides = ((rows, False), (x, gathers)) if transposed else ((x, gathers), (rows, False))
    (left, gathers_left), (right, gathers_right) = sides
    sizes = height, width = left.shape[1], right.shape[1]
    groups, tile = offs.shape[0], _WEIGHT
    out = x.new_empty(groups, *sizes)
    grid = triton.cdiv(width, tile.columns), triton.cdiv(height, tile.rows), groups
    given = left.contiguous(), right.contiguous(), offs if order is None else order, offs, out
    how = picks, gathers_left, gathers_right, tile.rows, tile.columns, tile.depth
    run = wrap(_weight_grad)[grid]
    run(*given, *sizes, *how, num_warps=tile.warps, num_stages=tile.stages)
    return out

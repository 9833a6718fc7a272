"""The Triton kernel of `fp8.fp8_grouped_mm` for blocks of 128; imported where there is a GPU."""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.row_kernels import at_least_one

BLOCK = 128
"""Numbers of a row that share a scale; and rows and columns of a matrix."""


@triton.jit
def _multiply(
    a,
    b,
    scale_a,
    scale_b,
    offs,
    out,
    groups,
    width: tl.constexpr,
    columns: tl.constexpr,
    bins: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
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
    column = tl.program_id(0) * block + tl.arange(0, block)
    inner = tl.arange(0, block)
    is_row = row < end
    blocks: tl.constexpr = width // block
    matrix = b + group.to(tl.int64) * columns * width
    scales = scale_b + (group.to(tl.int64) * (columns // block) + tl.program_id(0)) * blocks
    left = a + row.to(tl.int64)[:, None] * width + inner[None, :]
    right = matrix + column.to(tl.int64)[None, :] * width + inner[:, None]
    total = tl.zeros([rows, block], tl.float32)
    for i in range(blocks):
        x = tl.load(left + i * block, mask=is_row[:, None], other=0.0)
        w = tl.load(right + i * block)
        own = tl.load(scale_a + row.to(tl.int64) * blocks + i, mask=is_row, other=0.0)
        total += tl.dot(x, w) * (own * tl.load(scales + i))[:, None]
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None])


def multiply(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, dtype: torch.dtype
) -> Tensor:
    """`fp8.fp8_grouped_mm` with scales for 1 x 128 numbers of a and 128 x 128 of b."""
    groups, columns, width = b.shape
    out = a.new_empty(a.shape[0], columns, dtype=dtype)
    rows = 128 if a.shape[0] >= 64 * groups else 64
    grid = columns // BLOCK, at_least_one(triton.cdiv(a.shape[0], rows) + groups)
    bins = triton.next_power_of_2(groups)
    given = (t.contiguous() for t in (a, b, scale_a, scale_b, offs))
    sizes = groups, width, columns, bins, rows, BLOCK
    warps = 8 if rows == 128 else 4
    _multiply[grid](*given, out, *sizes, num_warps=warps, num_stages=3)
    return out

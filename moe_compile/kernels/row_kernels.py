"""The Triton kernels of `expert_rows`; imported where there is a GPU, as Triton comes with CUDA.

Every kernel is deterministic: no atomics, and sums in a fixed order.
"""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.visible import Wrap, as_it_is

_PICKS = 128
"""Picks that one program ranks, by comparing each with each."""

_COLUMNS = 2048
"""The most columns of a row that one program holds."""


@triton.jit
def _bins(ids, start, num_picks, num_experts, bins: tl.constexpr, size: tl.constexpr):
    """The bin of each of a program's picks: its expert, E for -1, and the last one beyond them."""
    at = start + tl.arange(0, size)
    own = tl.load(ids + at, mask=at < num_picks, other=0).to(tl.int32)
    own = tl.where(own < 0, num_experts, own)
    return tl.where(at < num_picks, own, bins - 1)


@triton.jit
def _count(ids, counts, num_picks, num_experts, bins: tl.constexpr, size: tl.constexpr):
    """counts[bin, program]: how many of a program's picks are of each bin."""
    program = tl.program_id(0)
    own = _bins(ids, program * size, num_picks, num_experts, bins, size)
    every = tl.arange(0, bins)
    tl.store(counts + every * tl.num_programs(0) + program, tl.histogram(own, bins))


@triton.jit
def _place(
    ids,
    ends,
    counts,
    order,
    inverse,
    num_picks,
    num_rows,
    num_experts,
    bins: tl.constexpr,
    size: tl.constexpr,
):
    """The row of each pick: after those of earlier bins, and of its own bin in order."""
    program = tl.program_id(0)
    start = program * size
    own = _bins(ids, start, num_picks, num_experts, bins, size)
    index = tl.arange(0, size)
    is_before = (own[:, None] == own[None, :]) & (index[None, :] < index[:, None])
    cell = own * tl.num_programs(0) + program
    row = tl.load(ends + cell) - tl.load(counts + cell) + tl.sum(is_before.to(tl.int32), axis=1)
    is_pick = start + index < num_picks
    tl.store(inverse + start + index, row, mask=is_pick)
    tl.store(order + row, start + index, mask=is_pick & (row < num_rows))


def group_picks(
    ids: Tensor, num_experts: int, num_rows: int | None, *, wrap: Wrap = as_it_is
) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_rows.group_picks` on a GPU: a counting sort of two passes over the picks."""
    num_picks = ids.numel()
    num_rows = num_picks if num_rows is None else num_rows
    # One more than there must be: a size that may be 1 is a question that a trace cannot answer.
    programs = num_picks // _PICKS + 2
    bins = triton.next_power_of_2(num_experts + 2)
    counts = torch.empty(bins, programs, dtype=torch.int32, device=ids.device)
    order, inverse = (counts.new_empty(size) for size in (num_rows, num_picks))
    ids = ids.contiguous()
    wrap(_count)[(programs,)](ids, counts, num_picks, num_experts, bins, _PICKS)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    sizes = num_picks, num_rows, num_experts, bins, _PICKS
    wrap(_place)[(programs,)](ids, ends, counts, order, inverse, *sizes)
    return order, inverse, ends.view(bins, programs)[:num_experts, -1].contiguous()


@triton.jit
def _spread(x, inverse, offs, out, tokens, width, last, picks: tl.constexpr, size: tl.constexpr):
    """A token's row to the place of each of its picks, if that is before offs[last]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * size + tl.arange(0, size)
    inside = (columns < width) & (token < tokens)
    values = tl.load(x + token * width + columns, mask=inside)
    count = tl.load(offs + last)
    for pick in tl.static_range(picks):
        row = tl.load(inverse + token * picks + pick, mask=token < tokens, other=0).to(tl.int64)
        tl.store(out + row * width + columns, values, mask=inside & (row < count))


@triton.jit
def _collect(
    rows, inverse, offs, out, tokens, width, last, picks: tl.constexpr, size: tl.constexpr
):
    """The sum of each token's rows in float32, without those from offs[last] on."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * size + tl.arange(0, size)
    inside = (columns < width) & (token < tokens)
    total = tl.zeros([size], tl.float32)
    count = tl.load(offs + last)
    for pick in tl.static_range(picks):
        row = tl.load(inverse + token * picks + pick, mask=token < tokens, other=0).to(tl.int64)
        is_real = inside & (row < count)
        total += tl.load(rows + row * width + columns, mask=is_real, other=0).to(tl.float32)
    tl.store(out + token * width + columns, total, mask=inside)


def at_least_one(programs: int) -> int:
    """A grid, symbolic or not, without programs is an error; what they do must be masked."""
    return torch.sym_max(programs, 1)  # pyright: ignore[reportReturnType]


def _grid(tokens: int, width: int) -> tuple[tuple[int, int], int]:
    size = min(triton.next_power_of_2(width), _COLUMNS)
    return (at_least_one(tokens), triton.cdiv(width, size)), size


def spread(
    x: Tensor, rows: int, inverse: Tensor, offs: Tensor, picks: int, *, wrap: Wrap = as_it_is
) -> Tensor:
    """`expert_rows.spread_rows` on a GPU, to a number of rows."""
    tokens, width = x.shape
    out = x.new_empty(rows, width)
    grid, size = _grid(tokens, width)
    sizes = tokens, width, offs.shape[0] - 1, picks, size
    wrap(_spread)[grid](x.contiguous(), inverse, offs, out, *sizes)
    return out


def collect(
    rows: Tensor, inverse: Tensor, offs: Tensor, picks: int, *, wrap: Wrap = as_it_is
) -> Tensor:
    """`expert_rows.collect_rows` on a GPU."""
    tokens, width = inverse.shape[0] // picks, rows.shape[1]
    out = rows.new_empty(tokens, width)
    grid, size = _grid(tokens, width)
    sizes = tokens, width, offs.shape[0] - 1, picks, size
    wrap(_collect)[grid](rows.contiguous(), inverse, offs, out, *sizes)
    return out

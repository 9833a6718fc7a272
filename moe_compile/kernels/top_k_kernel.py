"""The Triton kernel of `top_k`; imported where there is a GPU."""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.row_kernels import at_least_one

_NUMBERS = 1024
"""Numbers that one program holds: one row, or some."""


@triton.jit
def _top_k(x, values, ids, rows, width, k: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """The largest of each row, k times. A number and its place are one integer.

    Integers are in order if negative floats have all bits but the sign's flipped.
    """
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    at = tl.arange(0, size)[None, :]
    is_row = row < rows
    inside = is_row[:, None] & (at < width)
    own = tl.load(x + row[:, None] * width + at, mask=inside, other=0).to(tl.float32)
    bits = own.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(own == 0, 0, order)  # -0.0 is no less than 0.0
    order = tl.where(own != own, 0x7FFFFFFF, order).to(tl.int64)
    least = -0x8000000000000000
    key = tl.where(inside, order * 0x100000000 + (size - 1 - at), least)
    for pick in tl.static_range(k):
        best = tl.max(key, axis=1)
        order = (best >> 32).to(tl.int32)
        value = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
        tl.store(values + row * k + pick, value, mask=is_row)
        tl.store(ids + row * k + pick, size - 1 - (best & 0xFFFFFFFF), mask=is_row)
        key = tl.where(key == best[:, None], least, key)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k.top_k` of [T, E] on a GPU."""
    rows, width = x.shape
    values = x.new_empty(rows, k)
    ids = x.new_empty(rows, k, dtype=torch.int64)
    size = triton.next_power_of_2(width)
    block = max(_NUMBERS // size, 1)
    grid = (at_least_one((rows + block - 1) // block),)
    _top_k[grid](x.contiguous(), values, ids, rows, width, k, size, block)
    return values, ids

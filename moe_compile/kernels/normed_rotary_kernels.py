"""The Triton kernels of `normed_rotary`; imported where there is a GPU, as Triton comes with CUDA.

A row is one head of one token: D numbers, as D/2 pairs. Everything is read once, and written once;
the sums are in float32, and in a fixed order.
"""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.row_kernels import at_least_one
from moe_compile.kernels.visible import Wrap, as_it_is

_PAIRS = 2048
"""Pairs that one program holds: 16 for each of its threads, which is twice 16 bytes of bfloat16."""

_PROGRAMS = 4
"""Programs of the backward for each multiprocessor; each sums its part of the weight's gradient."""


@triton.jit
def _place(row, heads, length, by_batch, by_token, by_head):
    """Where each row of [B, S, H] begins, given the strides."""
    token = row // heads
    batch, position, head = token // length, token % length, row % heads
    return (
        batch.to(tl.int64) * by_batch
        + position.to(tl.int64) * by_token
        + head.to(tl.int64) * by_head
    )[:, None]


@triton.jit
def _single(number):
    """A number of Python in float32: a compiled graph hands it over in float64."""
    return tl.cast(number, tl.float32)


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _pair(pointer, at, inside, apart: tl.constexpr):
    """Two numbers that are `apart`; one number twice, if that is 0."""
    first = _load(pointer, at, inside)
    second = first
    if apart:
        second = _load(pointer, at + apart, inside)
    return first, second


@triton.jit
def _normed(first, second, inverse, eps):
    """Both halves of each row over its root mean square, and that scale."""
    squares = tl.sum(first * first + second * second, axis=1)
    scale = tl.rsqrt(squares * inverse + eps)[:, None]
    return first * scale, second * scale, scale


@triton.jit
def _forward(
    x,
    weight,
    cos,
    sin,
    out,
    rows,
    heads,
    length,
    x_batch,
    x_token,
    x_head,
    angle_batch,
    angle_token,
    inverse,
    eps,
    offset,
    half: tl.constexpr,
    step: tl.constexpr,
    apart: tl.constexpr,
    angle_apart: tl.constexpr,
    weighed: tl.constexpr,
    block: tl.constexpr,
    size: tl.constexpr,
):
    inverse, eps, offset = _single(inverse), _single(eps), _single(offset)
    row = tl.program_id(0) * block + tl.arange(0, block)
    pair = tl.arange(0, size)[None, :]
    inside = (row < rows)[:, None] & (pair < half)
    own = _place(row, heads, length, x_batch, x_token, x_head) + pair * step
    angle = _place(row, heads, length, angle_batch, angle_token, 0) + pair
    first, second = _pair(x, own, inside, apart)
    first, second, _ = _normed(first, second, inverse, eps)
    if weighed:
        scale1, scale2 = _pair(weight, pair * step, pair < half, apart)
        first, second = first * (offset + scale1), second * (offset + scale2)
    cos1, cos2 = _pair(cos, angle, inside, angle_apart)
    sin1, sin2 = _pair(sin, angle, inside, angle_apart)
    to = row.to(tl.int64)[:, None] * (2 * half) + pair
    tl.store(out + to, first * cos1 - second * sin1, mask=inside)
    tl.store(out + to + half, second * cos2 + first * sin2, mask=inside)


@triton.jit
def _backward(
    grad,
    x,
    weight,
    cos,
    sin,
    grad_x,
    parts,
    rows,
    heads,
    length,
    grad_batch,
    grad_token,
    grad_head,
    x_batch,
    x_token,
    x_head,
    angle_batch,
    angle_token,
    inverse,
    eps,
    offset,
    half: tl.constexpr,
    step: tl.constexpr,
    apart: tl.constexpr,
    angle_apart: tl.constexpr,
    weighed: tl.constexpr,
    block: tl.constexpr,
    size: tl.constexpr,
):
    """grad_x, and in parts[program] the sum of the weight's gradients of a program's rows."""
    inverse, eps, offset = _single(inverse), _single(eps), _single(offset)
    pair = tl.arange(0, size)[None, :]
    weight1, weight2 = tl.full([1, size], 1, tl.float32), tl.full([1, size], 1, tl.float32)
    if weighed:
        weight1, weight2 = _pair(weight, pair * step, pair < half, apart)
        weight1, weight2 = weight1 + offset, weight2 + offset
    total1, total2 = tl.zeros([block, size], tl.float32), tl.zeros([block, size], tl.float32)
    for start in range(tl.program_id(0) * block, rows, tl.num_programs(0) * block):
        row = start + tl.arange(0, block)
        inside = (row < rows)[:, None] & (pair < half)
        upstream = _place(row, heads, length, grad_batch, grad_token, grad_head) + pair
        own = _place(row, heads, length, x_batch, x_token, x_head) + pair * step
        angle = _place(row, heads, length, angle_batch, angle_token, 0) + pair
        first, second = _pair(grad, upstream, inside, half)
        normed1, normed2 = _pair(x, own, inside, apart)
        cos1, cos2 = _pair(cos, angle, inside, angle_apart)
        sin1, sin2 = _pair(sin, angle, inside, angle_apart)
        first, second = first * cos1 + second * sin2, second * cos2 - first * sin1
        normed1, normed2, scale = _normed(normed1, normed2, inverse, eps)
        if weighed:
            total1 += first * normed1
            total2 += second * normed2
            first, second = first * weight1, second * weight2
        along = (tl.sum(first * normed1 + second * normed2, axis=1) * inverse)[:, None]
        to = row.to(tl.int64)[:, None] * (2 * half) + pair * step
        tl.store(grad_x + to, scale * (first - normed1 * along), mask=inside)
        tl.store(grad_x + to + apart, scale * (second - normed2 * along), mask=inside)
    if weighed:
        part = parts + tl.program_id(0) * (2 * half) + tl.arange(0, size) * step
        tl.store(part, tl.sum(total1, axis=0), mask=tl.arange(0, size) < half)
        tl.store(part + apart, tl.sum(total2, axis=0), mask=tl.arange(0, size) < half)


def forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
    dtype: torch.dtype,
    *,
    wrap: Wrap = as_it_is,
) -> Tensor:
    """`normed_rotary.normed_rotary` on a GPU."""
    x, cos, sin = (_with_whole_rows(t) for t in (x, cos, sin))
    out = x.new_empty(x.shape, dtype=dtype)
    form = _form(x, weight, cos, interleaved)
    sizes = _sizes(x)
    strides = *x.stride()[:3], *_strides_of_angles(cos)
    scalars = 1 / _width(x), eps, offset
    grid = (at_least_one(triton.cdiv(sizes[0], form["block"])),)
    given = x, x if weight is None else weight.contiguous(), cos, sin, out
    wrap(_forward)[grid](*given, *sizes, *strides, *scalars, **form)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
    *,
    wrap: Wrap = as_it_is,
) -> tuple[Tensor, Tensor]:
    """`normed_rotary.normed_rotary_backward` on a GPU."""
    grad, x, cos, sin = (_with_whole_rows(t) for t in (grad, x, cos, sin))
    programs = _PROGRAMS * _multiprocessors(x.device)
    grad_x = x.new_empty(x.shape)
    parts = x.new_empty(0 if weight is None else programs, x.shape[-1], dtype=torch.float32)
    strides = *grad.stride()[:3], *x.stride()[:3], *_strides_of_angles(cos)
    scalars = 1 / _width(x), eps, offset
    given = grad, x, x if weight is None else weight.contiguous(), cos, sin, grad_x, parts
    form = _form(x, weight, cos, interleaved)
    wrap(_backward)[(programs,)](*given, *_sizes(x), *strides, *scalars, **form)
    if weight is None:
        return grad_x, x.new_empty(0)
    return grad_x, parts.sum(0).to(weight.dtype)


def _with_whole_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides_of_angles(cos: Tensor) -> tuple[int, ...]:
    """Of batch and position; what is the same for all of them is not moved along."""
    sizes = zip(cos.shape[:2], cos.stride()[:2], strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)


def _width(x: Tensor) -> int:
    """As a number of Python: the kernels of a compiled graph are for one width."""
    return int(x.shape[-1])


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, length, heads, _ = x.shape
    return batch * length * heads, heads, length


def _form(x: Tensor, weight: Tensor | None, cos: Tensor, interleaved: bool) -> dict[str, Any]:
    """What a kernel is compiled for."""
    half = _width(x) // 2
    size = triton.next_power_of_2(half)
    return {
        "half": half,
        "step": 2 if interleaved else 1,
        "apart": 1 if interleaved else half,
        "angle_apart": half if cos.shape[-1] > half else 0,
        "weighed": weight is not None,
        "block": max(_PAIRS // size, 1),
        "size": size,
    }


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

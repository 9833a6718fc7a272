"""The Triton kernels of `activation`, written for one activation; imported where there is a GPU."""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false
import functools
import linecache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.activation_source import ActivationSource
from moe_compile.kernels.row_kernels import at_least_one
from moe_compile.kernels.visible import Wrap, as_it_is

_MOST_COLUMNS = 1024
"""The most numbers of a row that one program holds."""

_PROGRAMS = 16384
"""The most programs: each has every such row, so none starts for nothing but rows that hold any."""


def forward(
    source: ActivationSource, x: Tensor, weight: Tensor, offs: Tensor, *, wrap: Wrap = as_it_is
) -> Tensor:
    """`activation.activate` on a GPU."""
    rows, size = x.shape[0], _size(source)
    out = x.new_empty(rows, source.width)
    grid = _programs(rows), triton.cdiv(source.width, size)
    run = wrap(_kernels(source)["forward"])
    run[grid](x.contiguous(), weight.contiguous(), offs, out, offs.shape[0] - 1, size)
    return out


def backward(
    source: ActivationSource,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    again: bool,
    *,
    wrap: Wrap = as_it_is,
) -> tuple[Tensor, Tensor, Tensor]:
    """`activation.activate_backward` on a GPU: everything is read once."""
    grad_x, grad_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    out = x.new_empty(grad.shape if again else (0, 0))
    inputs = (t.contiguous() for t in (grad, x, weight))
    outputs = grad_x, grad_weight, out
    grid = (_programs(x.shape[0]),)
    run = wrap(_kernels(source)["backward"])
    run[grid](*inputs, offs, *outputs, offs.shape[0] - 1, _size(source), again)
    return grad_x, grad_weight, out


def _programs(rows: int) -> int:
    most = torch.sym_min(rows, _PROGRAMS)
    return at_least_one(most)  # pyright: ignore[reportArgumentType]


def _size(source: ActivationSource) -> int:
    return min(triton.next_power_of_2(source.width), _MOST_COLUMNS)


_FORWARD = """
@triton.jit
def forward(x, weight, offs, out, last, size: tl.constexpr):
    at = tl.program_id(1) * size + tl.arange(0, size)
    inside = at < {width}
    for each in range(tl.program_id(0), tl.load(offs + last), tl.num_programs(0)):
        row = tl.cast(each, tl.int64)
        scale = tl.load(weight + row).to(tl.float32)
        {loads}
        {lines}
        tl.store(out + row * {width} + at, {result} * scale, mask=inside)
"""

_BACKWARD = """
@triton.jit
def backward(
    outer,
    x,
    weight,
    offs,
    grad_x,
    grad_weight,
    out,
    last,
    size: tl.constexpr,
    again: tl.constexpr,
):
    for each in range(tl.program_id(0), tl.load(offs + last), tl.num_programs(0)):
        row = tl.cast(each, tl.int64)
        scale = tl.load(weight + row).to(tl.float32)
        total = tl.zeros([size], tl.float32)
        for start in range(0, {width}, size):
            at = start + tl.arange(0, size)
            inside = at < {width}
            own = tl.load(outer + row * {width} + at, mask=inside, other=0).to(tl.float32)
            grad = own * scale
            {loads}
            {lines}
            total += tl.where(inside, {result} * own, 0.0)
            {stores}
            if again:
                tl.store(out + row * {width} + at, {result} * scale, mask=inside)
        tl.store(grad_weight + row, tl.sum(total, axis=0))
"""


@functools.cache
def _kernels(source: ActivationSource) -> dict[str, Any]:
    """Both kernels, compiled when they are first called."""
    result, *grads = source.backward.results
    places = [
        f"row * {sum(columns.count for columns in source.columns)} + {columns.start} + "
        f"at * {columns.step}"
        for columns in source.columns
    ]
    loads = [
        f"x{i} = tl.load(x + {place}, mask=inside, other=0).to(tl.float32)"
        for i, place in enumerate(places)
    ]
    stores = [
        f"tl.store(grad_x + {place}, {grad}, mask=inside)"
        for place, grad in zip(places, grads, strict=True)
    ]
    text = _FORWARD.format(
        width=source.width,
        loads=_joined(loads, 2),
        lines=_joined(source.forward.lines, 2),
        result=source.forward.results[0],
    ) + _BACKWARD.format(
        width=source.width,
        loads=_joined(loads, 3),
        lines=_joined(source.backward.lines, 3),
        result=result,
        stores=_joined(stores, 3),
    )
    name = f"<moe_compile activation {abs(hash(source))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl}
    exec(compile(text, name, "exec"), namespace)  # our own source, from our own graph
    return namespace


def _joined(lines: Any, depth: int) -> str:
    return ("\n" + "    " * depth).join(lines)

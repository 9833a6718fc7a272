"""Matrix products of consecutive groups of rows, each with its own matrix, in every dtype.

    grouped_mm(x, w, offs)[r] = x[r] @ w[e]   for offs[e - 1] <= r < offs[e],  0 beyond offs[-1]

`F.grouped_mm` has four gaps which this file closes: rows beyond the last offset are uninitialised
in its output and in its gradient, expanded gradients fail, strides must be multiples of 16 bytes,
and under `torch.compile` it takes bfloat16 alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _aligned(t: Tensor) -> bool:
    """Whether `F.grouped_mm` takes the strides of the matrices in `t`."""
    row, column = t.stride()[-2:]
    pitch = row if column == 1 else column
    return (row == 1 or column == 1) and pitch * t.element_size() % 16 == 0


def _native(a: Tensor, b: Tensor) -> bool:
    """Whether `F.grouped_mm` takes `a` and `b`, and is the fastest way.

    On a CPU it is for float32, by 5 % for large groups and by a factor of 3 for small ones. A CPU
    without bfloat16 arithmetic multiplies half precision 5 to 50 times faster by way of float32.
    """
    if not (_aligned(a) and _aligned(b)):
        return False
    if a.device.type == "cpu":
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return a.dtype == torch.float32 or (a.dtype == torch.bfloat16 and has_bfloat16)
    return a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(a.device) >= (8, 0)


def _hit_groups(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, with its rows; waits for the device."""
    ends: list[int] = offs.tolist()
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            yield group, slice(start, end)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 for half precision on a CPU (see `_native`); never under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16):
            return a.float() @ b.float()
        return a @ b


def mask_tail(rows: Tensor, offs: Tensor) -> Tensor:
    """`rows`, and their gradient, with zeros beyond offs[-1]; never waits for the device."""
    index = torch.arange(rows.shape[0], device=rows.device)
    return torch.where(index[:, None] < offs[-1], rows, 0.0)


@torch.library.custom_op("moe_compile::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, offs: Tensor, transposed: bool = False) -> Tensor:
    """Multiply each group of x's rows by its matrix.

    Args:
        x: [R, A].
        w: [E, A, B] in x's dtype and any strides; a transposed view of [E, B, A] is not copied.
        offs: [E] int32, the end of each group; not decreasing, at most R.
        transposed: w is [E, B, A], and its transposes are meant. Where w is cheap to make again,
            as a gathered one is, this leaves no view of it for a partitioner to keep instead.

    Returns:
        [R, B], fresh and contiguous; zero beyond offs[-1], and so is the gradient of x.
    """
    w = w.mT if transposed else w
    if not _native(x, w):
        out = x.new_zeros(x.shape[0], w.shape[2])
        for group, rows in _hit_groups(offs):
            out[rows] = _mm(x[rows], w[group])
        return out
    # The columns of `F.grouped_mm`'s output may be padded.
    out = F.grouped_mm(x, w, offs=offs).contiguous()
    if x.device.type != "cpu":
        return mask_tail(out, offs)
    out[offs[-1] :] = 0  # 100 times faster than the mask
    return out


@torch.library.custom_op("moe_compile::grouped_mm_weight_grad", mutates_args=())
def grouped_mm_weight_grad(x: Tensor, g: Tensor, offs: Tensor) -> Tensor:
    """x.T @ g for each group of rows: the gradient of `grouped_mm`'s w.

    Args:
        x: [R, A].
        g: [R, B] in x's dtype.
        offs: [E] int32, as in `grouped_mm`.

    Returns:
        [E, A, B], fresh and contiguous; zero for a group without rows.
    """
    if _native(x.t(), g):
        return F.grouped_mm(x.t(), g, offs=offs).contiguous()
    out = x.new_zeros(offs.shape[0], x.shape[1], g.shape[1])
    for group, rows in _hit_groups(offs):
        out[group] = _mm(x[rows].t(), g[rows])
    return out


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, offs: Tensor, transposed: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1 if transposed else 2])


@grouped_mm_weight_grad.register_fake
def _(x: Tensor, g: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], x.shape[1], g.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, w, offs = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_mm(grad, w, offs, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        # In the layout of w: autograd would copy any other one into the parameter's gradient.
        is_view = w.stride(-1) != 1
        pair = (grad, x) if is_view != ctx.transposed else (x, grad)
        grad_w = grouped_mm_weight_grad(*pair, offs)
        grad_w = grad_w.mT if is_view else grad_w
    return grad_x, grad_w, None, None


grouped_mm.register_autograd(_backward, setup_context=_save)


def _native_in_graph(x: Tensor, w: Tensor) -> bool:
    """Whether Inductor's call of `F.grouped_mm`, and torch's own backward of it, are right too."""
    # Imported here because it brings sympy, which takes most of a second.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # The backward multiplies gradients of [R, B], which must be aligned like x. Inductor gives a
    # tensor without rows strides that `F.grouped_mm` rejects.
    aligned_out = w.shape[2] * w.element_size() % 16 == 0
    return aligned_out and not statically_known_true(x.shape[0] == 0)


def grouped_linear(x: Tensor, w: Tensor, offs: Tensor, transposed: bool = False) -> Tensor:
    """`grouped_mm`, by torch's own op where Inductor can see into it: bfloat16 on CUDA.

    There rows beyond offs[-1] hold anything, and so do those of x's gradient.
    """
    matrices = w.mT if transposed else w
    if x.device.type == "cuda" and _native(x, matrices) and _native_in_graph(x, matrices):
        return F.grouped_mm(x, matrices, offs=offs)
    return grouped_mm(x, w, offs, transposed)


def grouped_weight_grad(x: Tensor, g: Tensor, offs: Tensor) -> Tensor:
    """`grouped_mm_weight_grad`, by torch's own op where `grouped_linear` has it."""
    if x.device.type == "cuda" and _native(x.t(), g) and _native_in_graph(x, g[None]):
        return F.grouped_mm(x.t(), g, offs=offs)
    return grouped_mm_weight_grad(x, g, offs)

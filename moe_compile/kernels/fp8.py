"""Products of eight-bit numbers, with the scales of their blocks: see `moe_compile.ops.fp8`.

The products are operators: torch's kernels on CUDA, and elsewhere those of what the numbers stand
for. Quantising is plain torch, so that Inductor fuses it with what is before it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.kernels.grouped_mm import grouped_mm, grouped_mm_weight_grad
from moe_compile.ops.fp8 import (
    E4M3,
    EXPERT_SCALINGS,
    SCALINGS,
    Block,
    Recipe,
    Scaling,
    dequantize,
    linear,
    quantize,
)


@torch.library.custom_op("moe_compile::fp8_mm", mutates_args=())
def fp8_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """a @ b.T of numbers with scales.

    Args:
        a: [M, K], eight-bit.
        b: [N, K], eight-bit.
        scale_a: [M / rows, K / columns] float32.
        scale_b: [N / rows, K / columns] float32.
        dtype: the result's.
        fast: whether the tensor cores may keep sums with fewer bits.

    Returns:
        [M, N].
    """
    if a.device.type != "cuda":
        with torch.autocast(a.device.type, enabled=False):
            return (dequantize(a, scale_a) @ dequantize(b, scale_b).mT).to(dtype)
    if a.shape[0] == 0:
        return a.new_empty(0, b.shape[0], dtype=dtype)
    if scale_a.numel() > 1 or scale_b.numel() > 1:
        return _blockwise_mm(a, b, scale_a, scale_b, dtype)
    a, b = (_padded(t, columns=-t.shape[1] % 16).contiguous() for t in (a, b))
    return torch.ops.aten._scaled_mm(
        a, b.t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast
    )


@fp8_mm.register_fake
def _(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _blockwise_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype
) -> Tensor:
    """`fp8_mm` with scales for 1 x 128 numbers of a, and for these or 128 x 128 of b."""
    count, short = a.shape[0], -a.shape[0] % 16  # columns of scales are aligned
    a, scale_a = _padded(a, rows=short), F.pad(scale_a, (0, 0, 0, short))
    out = F.scaled_mm(
        a.contiguous(),
        b.contiguous().t(),
        scale_a.t().contiguous().t(),
        F.ScalingType.BlockWise1x128,
        *_scales_of(b, scale_b),
        output_dtype=torch.bfloat16,
    )
    return out[:count].to(dtype).contiguous()


def _scales_of(b: Tensor, scale: Tensor) -> tuple[Tensor, Any]:
    """As cuBLAS reads them: those of tiles with as many columns as a multiple of four."""
    if scale.shape[0] == b.shape[0]:
        return scale.t().contiguous().t(), F.ScalingType.BlockWise1x128
    tiles = F.pad(scale, (0, -scale.shape[1] % 4)).contiguous()
    return tiles.t(), F.ScalingType.BlockWise128x128


def _padded(q: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    if rows or columns:
        return F.pad(q.view(torch.uint8), (0, columns, 0, rows)).view(q.dtype)
    return q


@torch.library.custom_op("moe_compile::fp8_grouped_mm", mutates_args=())
def fp8_grouped_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Each group of a's rows @ its matrix, transposed; with scales for rows or for blocks of 128.

    Args:
        a: [R, K], e4m3.
        b: [E, N, K], e4m3.
        scale_a: [R, 1] or [R, K / 128] float32.
        scale_b: [E, N, 1] or [E, N / 128, K / 128] float32.
        offs: [E] int32, the end of each group; not decreasing, at most R.
        dtype: the result's; on CUDA bfloat16.

    Returns:
        [R, N]; rows beyond offs[-1] hold anything. Never waits for the device.
    """
    if a.device.type != "cuda":
        wide = dequantize(a, scale_a), dequantize(b, scale_b)
        return grouped_mm(*wide, offs, True).to(dtype)
    if a.shape[0] == 0:
        return a.new_empty(0, b.shape[1], dtype=dtype)
    if scale_b.shape[1] != b.shape[1]:
        from moe_compile.kernels.fp8_kernels import multiply

        return multiply(a, b, scale_a, scale_b, offs, dtype)
    scales = scale_a.flatten().contiguous(), scale_b.squeeze(-1).contiguous()
    pair = a.contiguous(), b.contiguous().mT
    return torch.ops.aten._scaled_grouped_mm(
        *pair, *scales, offs, out_dtype=dtype, use_fast_accum=True
    )


@fp8_grouped_mm.register_fake
def _(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


class _Linear(torch.autograd.Function):
    """x [T, K] @ weight[N, K].T; no weight is kept but the parameter itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        (a, scale_a), (b, scale_b) = (
            quantize(x, E4M3, scaling.rows),
            quantize(weight, E4M3, scaling.weight),
        )
        return fp8_mm(a, b, scale_a, scale_b, x.dtype, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        scaling: Scaling = ctx.scaling
        grad = quantize(grads[0], scaling.grad, scaling.rows)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(grad, _turned(weight, E4M3, scaling.weight), x.dtype)
        if ctx.needs_input_grad[1]:
            pair = _turned(grads[0], scaling.grad, scaling.rows), _turned(x, E4M3, scaling.rows)
            grad_weight = _multiply(*pair, weight.dtype)
        return grad_x, grad_weight, None


def _multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return fp8_mm(a[0], b[0], a[1], b[1], dtype, False)


def _turned(x: Tensor, dtype: torch.dtype, block: Block) -> tuple[Tensor, Tensor]:
    """x.T, quantised: the same numbers as x's where those that share a scale are a square."""
    if block[0] == block[1]:
        q, scale = quantize(x, dtype, block)
        return q.mT.contiguous(), scale.mT.contiguous()
    short = -x.shape[0] % (block[1] or 1)
    q, scale = quantize(F.pad(x, (0, 0, 0, short)).mT, dtype, block)
    return q.contiguous(), scale


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, recipe: Recipe = "current"
) -> Tensor:
    """`ops.fp8_linear`."""
    return linear(_product, x, weight, bias, recipe)


def _product(rows: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    return _Linear.apply(rows, weight, SCALINGS[recipe])


class _GroupedLinear(torch.autograd.Function):
    """Each group of x's rows times its matrix; the gradient of the matrices is exact."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, offs: Tensor, transposed: bool, scaling: Scaling
    ) -> Tensor:
        ctx.save_for_backward(x, w, offs)
        ctx.transposed, ctx.scaling = transposed, scaling
        return _grouped(x, w if transposed else w.mT, offs, scaling, E4M3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, w, offs = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            matrices = w.mT if ctx.transposed else w
            grad_x = _grouped(grad, matrices, offs, ctx.scaling, ctx.scaling.grad)
        if ctx.needs_input_grad[1]:
            pair = (grad, x) if ctx.transposed else (x, grad)
            grad_w = grouped_mm_weight_grad(*pair, offs)
        return grad_x, grad_w, None, None, None


def _grouped(
    rows: Tensor, matrices: Tensor, offs: Tensor, scaling: Scaling, dtype: torch.dtype
) -> Tensor:
    """rows [R, K], in `dtype`, times matrices[E, N, K], transposed."""
    a, scale_a = quantize(rows, dtype, scaling.rows)
    b, scale_b = quantize(matrices, E4M3, scaling.weight)
    return fp8_grouped_mm(a, b.contiguous(), scale_a, scale_b, offs, rows.dtype)


def fp8_grouped_linear(
    x: Tensor, w: Tensor, offs: Tensor, transposed: bool = False, *, recipe: Recipe
) -> Tensor:
    """`grouped_linear` of e4m3 numbers: see `ops.experts`.

    Rows beyond offs[-1] hold anything, and so do those of x's gradient.
    """
    return _GroupedLinear.apply(x, w, offs, transposed, EXPERT_SCALINGS[recipe])


_RESULTS = (torch.bfloat16, torch.float16, torch.float32)


def linear_problem(dtype: torch.dtype, weight: Tensor, recipe: Recipe) -> str | None:
    """Why `fp8_linear` does not take a weight [N, K] and rows of `dtype`, or None."""
    multiple = SCALINGS[recipe].multiple()
    if weight.shape[0] % multiple or weight.shape[1] % multiple:
        return _sizes_problem(multiple, weight)
    if weight.is_cuda and dtype not in _RESULTS:
        return f"torch's FP8 products give bfloat16, float16 or float32: got {dtype}"
    if weight.is_cuda and recipe == "blockwise" and not _has_blocks(weight.device):
        return "torch's FP8 products of blocks take compute capability 9.0 and CUDA 12.9 or newer"
    return None


def _has_blocks(device: torch.device) -> bool:
    cuda = tuple(int(number) for number in (torch.version.cuda or "0").split("."))
    return torch.cuda.get_device_capability(device) == (9, 0) and cuda >= (12, 9)


def experts_problem(up: Tensor, down: Tensor, recipe: Recipe) -> str | None:
    """Why `fp8_grouped_linear` does not take experts' weights, or None."""
    multiple = EXPERT_SCALINGS[recipe].multiple()
    for weight in (up, down):
        if weight.shape[1] % multiple or weight.shape[2] % multiple:
            return _sizes_problem(multiple, weight)
        if weight.is_cuda and weight.dtype != torch.bfloat16:
            return f"grouped FP8 products take bfloat16: got {weight.dtype}"
    if recipe == "current" and up.is_cuda and not _has_groups(up.device):
        return "torch's grouped FP8 products take compute capability 9.0 or 10.0"
    return None


def _has_groups(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def _sizes_problem(multiple: int, weight: Tensor) -> str:
    sizes = " x ".join(str(size) for size in weight.shape[-2:])
    return f"FP8 products take sizes that are multiples of {multiple}: its weight is {sizes}"

"""TransformerEngine's eight-bit products as custom ops: its module would break a layer's graph."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.fp8 import SCALINGS, Recipe, linear


def library() -> Any:
    """The module `transformer_engine.pytorch`, an optional dependency, loaded when first needed."""
    return importlib.import_module("transformer_engine.pytorch")


def gemm(*operands: Any, **options: Any) -> Tensor:
    """TransformerEngine's product of quantised tensors, which its public modules are made of."""
    extensions = importlib.import_module("transformer_engine.pytorch.cpp_extensions")
    result: Tensor = extensions.general_gemm(*operands, out_dtype=torch.bfloat16, **options)[0]
    return result


def _quantized(x: Tensor, recipe: str, *, weight: bool = False, grad: bool = False) -> Any:
    """x [M, K], and its transpose too, as the recipe has it."""
    te = library()
    both: dict[str, Any] = {"rowwise": True, "columnwise": True}
    if recipe == "current":
        kind = te.DType.kFloat8E5M2 if grad else te.DType.kFloat8E4M3
        quantizer = te.Float8CurrentScalingQuantizer(kind, x.device, **both)
    else:
        both |= {"block_scaling_dim": 2 if weight else 1, "force_pow_2_scales": False}
        quantizer = te.Float8BlockQuantizer(te.DType.kFloat8E4M3, **both)
    quantizer.internal = True
    with torch.no_grad():
        return quantizer(x.contiguous())


def _whole(rows: Tensor, recipe: str) -> Tensor:
    """With rows of zeros at the end, as many as its products of columns need."""
    short = -rows.shape[0] % (16 if recipe == "current" else 128)
    return F.pad(rows, (0, 0, 0, short)) if short else rows


@torch.library.custom_op("moe_compile::te_fp8_linear", mutates_args=())
def te_fp8_linear(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    """x [T, K] @ weight[N, K].T, both bfloat16, as `ops.fp8_linear` has it by the recipe."""
    rows = _quantized(_whole(x, recipe), recipe)
    exact = recipe != "current"
    out = gemm(
        _quantized(weight, recipe, weight=True), rows, layout="TN", use_split_accumulator=exact
    )
    return _first(out, x.shape[0])


def _first(rows: Tensor, count: int) -> Tensor:
    return rows[:count].clone() if rows.shape[0] > count else rows


@torch.library.custom_op("moe_compile::te_fp8_linear_backward", mutates_args=())
def te_fp8_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, recipe: str, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight; empty where one is not wanted."""
    options: dict[str, Any] = {"grad": True, "use_split_accumulator": True}
    rows = _quantized(_whole(grad, recipe), recipe, grad=True)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if wants_x:
        matrix = _quantized(weight, recipe, weight=True)
        grad_x = _first(gemm(matrix, rows, layout="NN", **options), x.shape[0])
    if wants_weight:
        inputs = _quantized(_whole(x, recipe), recipe)
        grad_weight = gemm(inputs, rows, layout="NT", **options)
    return grad_x, grad_weight


@te_fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@te_fp8_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, recipe: str, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    wanted = zip((x, weight), (wants_x, wants_weight), strict=True)
    grad_x, grad_weight = (t.new_empty(t.shape if wants else 0) for t, wants in wanted)
    return grad_x, grad_weight


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, weight, ctx.recipe = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    wanted = ctx.needs_input_grad[:2]
    grads = te_fp8_linear_backward(grad, *ctx.saved_tensors, ctx.recipe, *wanted)
    grad_x, grad_weight = (g if wants else None for g, wants in zip(grads, wanted, strict=True))
    return grad_x, grad_weight, None


te_fp8_linear.register_autograd(_backward, setup_context=_save)


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, recipe: Recipe = "current"
) -> Tensor:
    """`ops.fp8_linear`."""
    return linear(te_fp8_linear, x, weight, bias, recipe)


def problem(dtype: torch.dtype, weight: Tensor, recipe: Recipe) -> str | None:
    """Why `fp8_linear` does not take a weight [N, K] and rows of `dtype`, or None."""
    multiple = SCALINGS[recipe].multiple()
    if dtype != torch.bfloat16:
        return f"its FP8 products take bfloat16: got {dtype}"
    if weight.shape[0] % multiple or weight.shape[1] % multiple:
        return f"its FP8 products take sizes that are multiples of {multiple}"
    return None

"""Liger's kernels as custom ops: its own `autograd.Function`s would break a layer's graph."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor


def library(name: str) -> Any:
    """A module of `liger_kernel.ops`, an optional dependency that is loaded when first needed."""
    return importlib.import_module(f"liger_kernel.ops.{name}")


def _rounding(cast_first: bool) -> int:
    """Liger's number for the order of roundings."""
    return 0 if cast_first else 1


@torch.library.custom_op("moe_compile::liger_rms_norm", mutates_args=())
def liger_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """Args: as of `ops.rms_norm`.

    Returns: [..., H] in x's dtype; and of each row one over its root mean square, float32.
    """
    forward = library("rms_norm").rms_norm_forward
    y, _, scale, *_ = forward(x.contiguous(), weight, eps, offset, _rounding(cast_first), None)
    return y, scale


@torch.library.custom_op("moe_compile::liger_rms_norm_backward", mutates_args=())
def liger_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight; the latter is empty where there is none."""
    module = library("rms_norm")
    x = x.contiguous().view(-1, x.shape[-1])
    block, warps = module.calculate_settings(x.shape[1])
    given = (grad.contiguous(), x, weight, scale, offset, _rounding(cast_first))
    in_place, row_mode = False, None  # others may read the gradient
    grad_x, grad_weight = module.rms_norm_backward(*given, block, warps, in_place, row_mode)
    return grad_x, x.new_empty(0) if grad_weight is None else grad_weight


@torch.library.custom_op("moe_compile::liger_swiglu", mutates_args=())
def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., I]; fresh and contiguous."""
    out: Tensor = library("swiglu").swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return out


@torch.library.custom_op("moe_compile::liger_swiglu_backward", mutates_args=())
def liger_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    # The kernel writes the gradients over its inputs.
    copies = (t.clone(memory_format=torch.contiguous_format) for t in (gate, up))
    grad_gate, grad_up = library("swiglu").swiglu_backward(*copies, grad.contiguous())
    return grad_gate, grad_up


@liger_rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@liger_rms_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    grad_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), grad_weight


@liger_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@liger_swiglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.cast_first = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, weight, scale = ctx.saved_tensors
    options = (ctx.offset, ctx.cast_first)
    grad_x, grad_weight = liger_rms_norm_backward(grad, x, weight, scale, *options)
    return grad_x, None if weight is None else grad_weight, None, None, None


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return liger_swiglu_backward(grad, *ctx.saved_tensors)


liger_rms_norm.register_autograd(_norm_backward, setup_context=_save_norm)
liger_swiglu.register_autograd(_swiglu_backward, setup_context=_save_swiglu)

"""TransformerEngine's RMSNorm as custom ops on its extension: its module would break a graph."""

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor


def library() -> Any:
    """The module `transformer_engine_torch`, an optional dependency, loaded when first needed."""
    importlib.import_module("transformer_engine.pytorch")  # loads the libraries that it needs
    return importlib.import_module("transformer_engine_torch")


@functools.cache
def _dtypes() -> Any:
    return importlib.import_module("transformer_engine.pytorch.constants").TE_DType


@torch.library.custom_op("moe_compile::te_rms_norm", mutates_args=())
def te_rms_norm(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight, or * (1 + weight) where that is `zero_centered`.

    Args: x: [..., H]. weight: [H] in x's dtype.

    Returns: [..., H] in x's dtype; and of each row one over its root mean square, float32.
    """
    rows = x.contiguous().view(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)
    given = (rows, weight, eps, None, None, _dtypes()[x.dtype], 0, zero_centered)
    y, _, scale = library().rmsnorm_fwd(*given)
    return y.view(x.shape), scale


@torch.library.custom_op("moe_compile::te_rms_norm_backward", mutates_args=())
def te_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    width = x.shape[-1]
    if x.numel() == 0:
        return x.new_empty(x.shape), torch.zeros_like(weight)
    rows = (t.contiguous().view(-1, width) for t in (grad, x))
    grad_x, grad_weight = library().rmsnorm_bwd(*rows, scale, weight, 0, zero_centered)
    return grad_x.view(x.shape), grad_weight.view(weight.shape)


@te_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@te_rms_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *te_rms_norm_backward(grad, *ctx.saved_tensors, ctx.zero_centered), None, None


te_rms_norm.register_autograd(_backward, setup_context=_save)

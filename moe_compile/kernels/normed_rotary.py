"""The norm of every head and its rotary embedding, as one kernel each way.

    out = rotary(rms_norm(x, weight), cos, sin)

Rounded once, at the end. Only what is given is kept: the backward computes the norm again. The
heads of a token lie beside each other, as a projection gives them, in what comes in and goes out.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.kernels.visible import Wrap, as_it_is, show_kernels
from moe_compile.ops.canonical import upcast
from moe_compile.ops.normed_rotary import normed_rotary as op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WIDTH = 1024


def misfit(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernels do not take such tensors; None where they do. Sizes may be symbolic."""
    given = (x, cos, sin) if weight is None else (x, weight, cos, sin)
    strange = next((t.dtype for t in given if t.dtype not in _DTYPES), None)
    width, angles = x.shape[-1], _with_four_sizes(cos).shape
    if strange is not None:
        return f"it takes bfloat16, float16 and float32: got {strange}"
    if x.dim() != 4 or cos.dim() > 4 or sin.shape != cos.shape:
        return f"it takes heads in four dimensions: got {x.dim()}, and angles in {cos.dim()}"
    if width % 2 or width > _MAX_WIDTH or angles[3] not in (width, width // 2):
        return f"it turns whole heads of even widths up to {_MAX_WIDTH}: got {width}"
    places: list[Any] = list(angles[1:3])
    if not any(isinstance(size, int) and size == 1 for size in places):
        return "it takes the same angles for all heads of a token"
    return None


def normed_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    cast_first: bool = False,
    offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """`ops.normed_rotary` of what is no `misfit`."""
    dtype = torch.promote_types(_dtype_of_norm(x, weight, cast_first, offset), cos.dtype)
    cos, sin = _with_four_sizes(cos), _with_four_sizes(sin)
    if cos.shape[1] != 1:  # [B, S, 1, D]
        cos, sin = (_of_tokens(t.squeeze(2), x) for t in (cos, sin))
        return turn_normed(x, weight, cos, sin, eps, offset, interleaved, dtype)
    x = x.transpose(1, 2)
    cos, sin = (_of_tokens(t.squeeze(1), x) for t in (cos, sin))
    return turn_normed(x, weight, cos, sin, eps, offset, interleaved, dtype).transpose(1, 2)


def _with_four_sizes(angles: Tensor) -> Tensor:
    return angles[(None,) * (4 - angles.dim())]


def _of_tokens(angles: Tensor, x: Tensor) -> Tensor:
    """[B, S, ...] of every token, without a copy."""
    return angles.expand(x.shape[0], x.shape[1], -1)


def _dtype_of_norm(
    x: Tensor, weight: Tensor | None, cast_first: bool, offset: float
) -> torch.dtype:
    if weight is None or not cast_first:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32 if offset else weight.dtype)


@torch.library.custom_op("moe_compile::normed_rotary", mutates_args=())
def turn_normed(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Args: x: [B, S, heads, D]. cos, sin: [B, S, D/2] or [B, S, D]. dtype: of the result.

    Returns: [B, S, heads, D], fresh and contiguous.
    """
    if x.is_cuda:
        return _forward_on_gpu(x, weight, cos, sin, eps, offset, interleaved, dtype)
    return _in_torch(x, weight, cos, sin, eps, offset, interleaved).to(dtype)


@torch.library.custom_op("moe_compile::normed_rotary_backward", mutates_args=())
def turn_normed_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight; the latter is empty where there is none."""
    if x.is_cuda:
        return _backward_on_gpu(grad, x, weight, cos, sin, eps, offset, interleaved)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        own = weights[0] if weights else None
        return _in_torch(x, own, cos, sin, eps, offset, interleaved)

    given = (x,) if weight is None else (x, weight)
    out, pull_back, *_ = torch.func.vjp(run, *given)
    grad_x, *rest = pull_back(grad.to(out.dtype))
    return grad_x.contiguous(), rest[0] if rest else x.new_empty(0)


@torch.library.custom_op("moe_compile::normed_rotary_angles_backward", mutates_args=())
def turn_normed_angles_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of cos and sin, which training does not want: in plain torch everywhere."""

    def run(cos: Tensor, sin: Tensor) -> Tensor:
        return _in_torch(x, weight, cos, sin, eps, offset, interleaved)

    out, pull_back, *_ = torch.func.vjp(run, cos, sin)
    grad_cos, grad_sin = pull_back(grad.to(out.dtype))
    return grad_cos.contiguous(), grad_sin.contiguous()


def _in_torch(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> Tensor:
    """What the kernels compute, in float32 or wider."""
    x, cos, sin = upcast(x), upcast(cos)[:, :, None], upcast(sin)[:, :, None]
    weight = None if weight is None else upcast(weight)
    return op.reference(x, weight, cos, sin, eps, offset=offset, interleaved=interleaved)


def _forward_on_gpu(
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
    from moe_compile.kernels import normed_rotary_kernels  # needs Triton

    given = (x, weight, cos, sin, eps, offset, interleaved, dtype)
    return normed_rotary_kernels.forward(*given, wrap=wrap)


def _backward_on_gpu(
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
    from moe_compile.kernels import normed_rotary_kernels

    given = (grad, x, weight, cos, sin, eps, offset, interleaved)
    return normed_rotary_kernels.backward(*given, wrap=wrap)


show_kernels(turn_normed, _forward_on_gpu)
show_kernels(turn_normed_backward, _backward_on_gpu)


@turn_normed.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@turn_normed_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(x.shape[-1])


@turn_normed_angles_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return cos.new_empty(cos.shape), sin.new_empty(sin.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps, offset, interleaved, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (eps, offset, interleaved)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *angles = ctx.saved_tensors
    given = (x, weight, *angles, *ctx.options)
    grad_x, grad_weight = turn_normed_backward(grad, *given)
    of_angles: tuple[Tensor | None, ...] = (None, None)
    if any(ctx.needs_input_grad[2:4]):
        of_angles = turn_normed_angles_backward(grad, *given)
    return grad_x, None if weight is None else grad_weight, *of_angles, None, None, None, None


turn_normed.register_autograd(_backward, setup_context=_save)

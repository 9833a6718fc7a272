"""The norm of every head and its rotary embedding, as one kernel each way.

    out = rotary(rms_norm(x, weight), cos, sin)

Rounded once, at the end. Only what is given is kept: the backward computes the norm again. The
heads of a token lie beside each other, as a projection gives them, in what comes in and goes out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile.kernels.visible import Wrap, as_it_is, show_kernels
from moe_compile.ops.canonical import upcast
from moe_compile.ops.normed_rotary import normed_rotary as op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WIDTH = 1024


def misfit(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernels do not take such tensors; None where they do. Sizes may be symbolic."""
    given = (x, cos, sin) if weight is None else (x, weight, cos, sin)
    strange = next((t.dtype for t in given if t.dtype not in _DTYPES), None)
    if strange is not None:
        return f"it takes bfloat16, float16 and float32: got {strange}"
    if x.dim() != 4 or not 0 < cos.dim() <= 4:
        return f"it takes heads in four dimensions: got {x.dim()}, and angles in {cos.dim()}"
    width, angles = x.shape[-1], [*[1] * (4 - cos.dim()), *cos.shape]
    if width % 2 or width > _MAX_WIDTH or angles[3] not in (width, width // 2):
        return f"it turns whole heads of even widths up to {_MAX_WIDTH}: got {width}"
    spread = all(
        _equal(1, size) or _equal(own, size)
        for own, size in zip(x.shape[:3], angles[:3], strict=True)
    )
    alike = cos.dim() == sin.dim() and all(map(_equal, cos.shape, sin.shape))
    if not spread or not alike:
        return f"it takes the angles of each token: got {angles} for {list(x.shape)}"
    if not (_equal(1, angles[1]) or _equal(1, angles[2])):
        return "it takes the same angles for all heads of a token"
    return None


def _equal(size: int, other: int) -> bool:
    """Whether two sizes are known to be equal."""
    return statically_known_true(size == other)


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
        cos, sin = cos.squeeze(2), sin.squeeze(2)
        return turn_normed(x, weight, cos, sin, eps, offset, interleaved, dtype)
    x = x.transpose(1, 2)
    cos, sin = cos.squeeze(1), sin.squeeze(1)
    return turn_normed(x, weight, cos, sin, eps, offset, interleaved, dtype).transpose(1, 2)


def _with_four_sizes(angles: Tensor) -> Tensor:
    return angles[(None,) * (4 - angles.dim())]


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
    """Args: x: [B, S, heads, D]. cos, sin: of B or 1, S or 1, D/2 or D. dtype: of the result.

    Returns: [B, S, heads, D], fresh and contiguous.
    """
    if x.is_cuda:
        return _forward_on_gpu(x, weight, cos, sin, eps, offset, interleaved, dtype)
    weight = None if weight is None else upcast(weight)
    cos, sin = (upcast(t)[:, :, None] for t in (cos, sin))
    form: dict[str, Any] = {"offset": offset, "interleaved": interleaved}
    return op.reference(upcast(x), weight, cos, sin, eps, **form).to(dtype)


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

    normed, inverse = _normed(x, eps)
    turned = _turned_back(
        upcast(grad), upcast(cos)[:, :, None], upcast(sin)[:, :, None], interleaved
    )
    of_weight = x.new_empty(0)
    if weight is not None:
        of_weight = (turned * normed).sum((0, 1, 2)).to(weight.dtype)
        turned = turned * (upcast(weight) + offset)
    along = (turned * normed).mean(-1, keepdim=True)
    return (inverse * (turned - normed * along)).to(x.dtype).contiguous(), of_weight


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

    normed, _ = _normed(x, eps)
    scaled = normed if weight is None else normed * (upcast(weight) + offset)
    own, upstream = _pairs(scaled, interleaved), upcast(grad).chunk(2, dim=-1)
    of_cos = torch.cat([g * n for g, n in zip(upstream, own, strict=True)], dim=-1).sum(2)
    of_sin = torch.cat((-upstream[0] * own[1], upstream[1] * own[0]), dim=-1).sum(2)
    if cos.shape[-1] < x.shape[-1]:  # one angle for both of a pair
        of_cos, of_sin = (t.unflatten(-1, (2, -1)).sum(-2) for t in (of_cos, of_sin))
    of_cos, of_sin = of_cos.sum_to_size(cos.shape), of_sin.sum_to_size(sin.shape)
    return of_cos.to(cos.dtype), of_sin.to(sin.dtype)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and one over that, in float32 or wider."""
    wide = upcast(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second of every pair."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of what was turned."""
    first, second = grad.chunk(2, dim=-1)
    is_full = cos.shape[-1] == grad.shape[-1]
    (cos1, cos2), (sin1, sin2) = (t.chunk(2, dim=-1) if is_full else (t, t) for t in (cos, sin))
    pairs = first * cos1 + second * sin2, second * cos2 - first * sin1
    return torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)


def _forward_on_gpu(*given: Any, wrap: Wrap = as_it_is) -> Tensor:
    from moe_compile.kernels import normed_rotary_kernels  # needs Triton

    return normed_rotary_kernels.forward(*given, wrap=wrap)


def _backward_on_gpu(*given: Any, wrap: Wrap = as_it_is) -> tuple[Tensor, Tensor]:
    from moe_compile.kernels import normed_rotary_kernels

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

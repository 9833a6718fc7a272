"""Root mean square normalisation over the last dimension."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical, upcast


@canonical
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_first: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), with the statistics in float32.

    Args:
        x: [..., H].
        weight: [H], or None for no scale.
        eps: Added to the mean square; in the square of x's unit.
        cast_first: Round to x's dtype before the scale (LLaMA), not after it (gpt-oss). The
            result's dtype is then that of `weight * x`, else x's.
        offset: Added to the weight in float32; 1.0 in Gemma and Qwen3-Next.

    Returns:
        [..., H].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    wide = upcast(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    scale = offset + upcast(weight) if offset else weight
    return scale * normed.to(x.dtype) if cast_first else (scale * normed).to(x.dtype)

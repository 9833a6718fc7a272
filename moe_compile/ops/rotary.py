"""Rotary position embedding of one tensor, given the cosines and sines of its angles."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate each pair of x's last dimension by its angle.

    Args:
        x: [..., D]; pair i is (x[i], x[i + D/2]), or (x[2i], x[2i + 1]) when `interleaved`.
        cos: Broadcasts against x, with a last dimension of D/2 (one angle a pair) or D (one an
            element, as `x * cos + rotate_half(x) * sin` reads it).
        sin: Shaped like cos.
        interleaved: Needs cos and sin of D/2.

    Returns:
        [..., D], always laid out in halves: first elements of all pairs, then the second ones.

    Source: Su et al. 2021, arXiv:2104.09864; the interleaved reading is DeepSeek's.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    if cos.shape[-1] == x.shape[-1]:
        return x * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

"""Rotary embedding over halves or pairs, with one cosine and sine for each pair.

before:  cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin); x1, x2: halves, or even and odd elements
after:   rotary(x, cos, sin, interleaved=...)

The result is in half layout in both cases.
"""

import torch
from torch import Tensor

from moe_compile.ops.rotary import rotary
from moe_compile.rewrite.pattern import Pattern


class RotarySplit(Pattern):
    """The layout of gpt-oss, and (`interleaved`) of DeepSeek's latent attention."""

    name = "rotary_split"
    kind = "rope"
    shapes = {"x": (2, 4, 6, 8), "cos": (2, 1, 6, 4), "sin": (2, 1, 6, 4)}

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
        """Each pair turned by its angle."""
        first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
        """The canonical op."""
        return rotary(x, cos, sin, interleaved=interleaved)

"""Rotary embedding over halves, with cosines and sines of full width.

before:  x * cos + cat(-x2, x1) * sin
after:   rotary(x, cos, sin)
"""

import torch
from torch import Tensor

from moe_compile.ops.rotary import rotary
from moe_compile.rewrite.pattern import Pattern


class RotaryHalf(Pattern):
    """The GPT-NeoX layout: element i turns with element i + D/2 (Su et al. 2021)."""

    name = "rotary_half"
    kind = "rope"
    shapes = {"x": (2, 4, 6, 8), "cos": (2, 1, 6, 8), "sin": (2, 1, 6, 8)}

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate_half`, as most model files spell it."""
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The canonical op."""
        return rotary(x, cos, sin)

"""RMSNorm as models spell it, in the three orders of cast and scale.

before:  x * rsqrt(mean(x^2) + eps) in float32; rounded before or after the weight, or 1 + weight
after:   rms_norm(x, weight, eps)

The same operations in the same order, so the same bits.
"""

import torch
from torch import Tensor

from moe_compile.ops.rms_norm import rms_norm
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.refuse import Refuse


class RMSNorm(Pattern):
    """Root mean square normalisation (Zhang and Sennrich 2019)."""

    name = "rms_norm"
    kind = "rms_norm"
    shapes = {"x": (4, 8), "weight": (8,)}

    @staticmethod
    def before(
        x: Tensor, weight: Tensor | None, eps: float, *, cast_first: bool, one_plus: bool
    ) -> Tensor:
        """The order of LLaMA (`cast_first`), of gpt-oss, or of Gemma (`one_plus`)."""
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if weight is None:
            return normed.to(x.dtype)
        scale = 1.0 + weight.to(torch.float32) if one_plus else weight
        return scale * normed.to(x.dtype) if cast_first else (scale * normed).to(x.dtype)

    @staticmethod
    def after(
        x: Tensor, weight: Tensor | None, eps: float, *, cast_first: bool, one_plus: bool
    ) -> Tensor:
        """The canonical op."""
        return rms_norm(x, weight, eps, cast_first=cast_first, offset=1.0 if one_plus else 0.0)

    def applies(self, *, weight: bool, cast_first: bool, one_plus: bool) -> bool:
        """Without a weight there is one order only."""
        return weight or not (cast_first or one_plus)

    def check(self, match: Match) -> None:
        """The weight is one vector, the same for every row."""
        weight = match.bindings["weight"]
        if weight is None:
            return
        if match.value("weight").shape != match.value("x").shape[-1:]:
            raise Refuse(f"the weight {weight} is no vector of the normalised size", weight)

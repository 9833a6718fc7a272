"""RMSNorm in the spellings that round otherwise: a power for the root, or a product without upcast.

before:  x * (mean(x^2) + eps) ^ -0.5, or with the mean alone in float32
after:   rms_norm(x, weight, eps)

The algebra is the same. A power and a root differ in the last bit, and the gradient of a product
that is not upcast is rounded once more.
"""

import torch
from torch import Tensor

from moe_compile.ops.rms_norm import rms_norm
from moe_compile.patterns.rms_norm import RMSNorm
from moe_compile.rewrite.pattern import Match, Pattern


class RespelledNorm(Pattern):
    """Root mean square normalisation, nearly as in `rms_norm`."""

    name = "respelled_norm"
    kind = "rms_norm"
    shapes = RMSNorm.shapes
    exact = False

    @staticmethod
    def before(
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        cast_first: bool,
        one_plus: bool,
        power: bool,
        narrow: bool,
    ) -> Tensor:
        """The orders of `rms_norm`, with a `power`, or with a product of `narrow` numbers."""
        wide = x.to(torch.float32)
        mean = wide.pow(2).mean(-1, keepdim=True) + eps
        root = torch.pow(mean, -0.5) if power else torch.rsqrt(mean)
        normed = (x if narrow else wide) * root
        if weight is None:
            return normed.to(x.dtype)
        scale = 1.0 + weight.to(torch.float32) if one_plus else weight
        return scale * normed.to(x.dtype) if cast_first else (scale * normed).to(x.dtype)

    @staticmethod
    def after(
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        cast_first: bool,
        one_plus: bool,
        power: bool,
        narrow: bool,
    ) -> Tensor:
        """The canonical op."""
        return rms_norm(x, weight, eps, cast_first=cast_first, offset=1.0 if one_plus else 0.0)

    def applies(
        self, *, weight: bool, cast_first: bool, one_plus: bool, power: bool, narrow: bool
    ) -> bool:
        """One of the two differences to `rms_norm`; without a weight there is one order only."""
        return power != narrow and (weight or not (cast_first or one_plus))

    def check(self, match: Match) -> None:
        """As of `rms_norm`."""
        RMSNorm().check(match)

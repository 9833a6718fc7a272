"""A gated feed-forward block.

before:  linear(act(linear(x, gate)) * linear(x, up), down)
after:   gated_mlp(x, gate, up, down, act)
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.gated_mlp import gated_mlp
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.region import check_row_wise


class GatedMLP(Pattern):
    """SwiGLU and its kin (Shazeer 2020), with any activation."""

    name = "gated_mlp"
    kind = "mlp"
    shapes = {
        "x": (4, 8),
        "gate": (8, 8),
        "up": (8, 8),
        "down": (8, 8),
        "activation": (8,),
        "gate_bias": (8,),
        "up_bias": (8,),
        "down_bias": (8,),
    }

    @staticmethod
    def before(
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        activation: Callable[[Tensor], Tensor],
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        """Three linear layers and a gate."""
        gated = activation(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
        return F.linear(gated, down, down_bias)

    @staticmethod
    def after(
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        activation: Callable[[Tensor], Tensor],
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        """The canonical op."""
        return gated_mlp(x, gate, up, down, activation, gate_bias, up_bias, down_bias)

    def applies(self, *, gate_bias: bool, up_bias: bool, down_bias: bool) -> bool:
        """All three have a bias, or none has."""
        return gate_bias == up_bias == down_bias

    def check(self, match: Match) -> None:
        """The activation acts on each token alone."""
        check_row_wise(match.bindings["activation"])

"""The gated feed-forward block (SwiGLU, GeGLU and their relatives)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """(activation(x @ gate.T) * (x @ up.T)) @ down.T, each product with its bias.

    Args:
        x: [..., H].
        gate: [I, H].
        up: [I, H].
        down: [H, I].
        activation: Elementwise, on [..., I].
        gate_bias: [I].
        up_bias: [I].
        down_bias: [H].

    Returns:
        [..., H].

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    gated = activation(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    return F.linear(gated, down, down_bias)

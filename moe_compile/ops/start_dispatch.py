"""The first half of `dispatch`: tokens set off, and something else may be computed meanwhile."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def start_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
    after: Tensor | None = None,
) -> list[Tensor]:
    """Begin to send each token once to every rank that owns one of its experts.

    The reference is the meaning for a group of one rank, where every token is at home.

    Args:
        x, ids, weights, num_experts, group, max_tokens: As in `dispatch`.
        after: What another start or wait said that it was done by: this one comes later, on every
            rank and in the backward too (there, earlier). Ranks whose starts come in different
            orders wait for each other for ever.

    Returns:
        first what this was done by; the rest only `wait_dispatch` reads.
    """
    return [torch.zeros(1, device=x.device), x, ids, weights]

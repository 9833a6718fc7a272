"""The second half of `combine`: the results of a rank's tokens are here."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def wait_combine(
    flight: list[Tensor], num_tokens: int, group: str, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Wait for what a `start_combine` has begun, and sum, unweighted, the rows of each token.

    The reference is the meaning for a group of one rank, where every row is at home.

    Args:
        flight: From `start_combine`; it is waited for once.
        num_tokens: T, this rank's tokens.
        group: As in `start_combine`.
        after: As in `start_dispatch`.

    Returns:
        [T, H], zero for a token without an expert; and what this was done by.
    """
    done, out = flight
    return out, torch.zeros_like(done)

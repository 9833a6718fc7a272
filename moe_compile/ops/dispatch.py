"""The first op boundary of expert parallelism: tokens travel to the ranks of their experts."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token once to every rank that owns one of its experts.

    The reference is the meaning for a group of ONE rank, the identity. No provider for more ranks
    exists in this release.

    Args:
        x: [T, H], this rank's tokens.
        ids: [T, K], experts in 0..num_experts-1, or -1 for none.
        weights: [T, K].
        num_experts: Over the whole group; rank r owns an equal and contiguous part of them.
        group: Name of the process group.

    Returns:
        rows [U, H], the tokens received; their ids [U, K], counted from this rank's first expert,
        or -1 for an expert that lives elsewhere; their weights [U, K]; and for `combine` the source
        [V], the token of each row sent, and the splits [2, ranks], the rows sent to and received
        from each rank.
    """
    tokens = x.shape[0]
    source = torch.arange(tokens, device=x.device)
    return x, ids, weights, source, torch.full((2, 1), tokens, dtype=torch.int64)

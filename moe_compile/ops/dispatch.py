"""The first op boundary of expert parallelism: tokens travel to the ranks of their experts."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Send each token once to every rank that owns one of its experts.

    The reference is the meaning for a group of one rank, where every token is at home.

    Args:
        x: [T, H], this rank's tokens; T may be 0, and differ between ranks.
        ids: [T, K], experts in 0..num_experts-1, or -1 for none.
        weights: [T, K].
        num_experts: Over the whole group; rank r owns an equal and contiguous part of them.
        group: Name of the process group, of which all ranks make this call.
        max_tokens: No rank brings more tokens, if given. A provider may then return rows for all
            that could come, so as not to wait until it knows how many do.

    Returns:
        rows [U, H], the tokens received; their ids [U, K], counted from this rank's first expert,
        or -1 for an expert that lives elsewhere; their weights [U, K], of which those of other
        ranks' experts mean nothing, but are finite; places [P, 0], without elements: no more than P
        of the ids are other than -1; and the handle, tensors that only `combine` reads. Rows for
        tokens that did not come have no expert: they and their gradients are whatever the memory
        held, NaN too.
    """
    places = x.new_empty(ids.numel(), 0)
    return x, ids, weights, places, [torch.arange(x.shape[0], device=x.device)]

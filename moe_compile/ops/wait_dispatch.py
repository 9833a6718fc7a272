"""The second half of `dispatch`: the tokens that other ranks sent are here."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def wait_dispatch(
    flight: list[Tensor],
    group: str,
    max_tokens: int | None = None,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Wait for what a `start_dispatch` has begun.

    The reference is the meaning for a group of one rank, where every token is at home.

    Args:
        flight: From `start_dispatch`; it is waited for once.
        group, max_tokens: As in `start_dispatch`.
        after: As in `start_dispatch`.

    Returns:
        rows [U, H], their ids [U, K], their weights [U, K], places [P, 0] and the handle, as
        `dispatch` does; and what this was done by.
    """
    done, x, ids, weights = flight
    places = x.new_empty(ids.numel(), 0)
    handle = [torch.arange(x.shape[0], device=x.device)]
    return x, ids, weights, places, handle, torch.zeros_like(done)

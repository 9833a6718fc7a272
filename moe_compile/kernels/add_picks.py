"""Counting where tokens went, inside of layers, without ever waiting for the device."""

import torch
from torch import Tensor


@torch.library.custom_op("moe_compile::add_picks", mutates_args=("counts",))
def add_picks(counts: Tensor, ids: Tensor) -> None:
    """Add the picks of one call; those that a backward makes again do not count.

    Args:
        counts: [E + 1] int64; the first is of picks that went nowhere.
        ids: [T, K] of integers in -1..E-1.
    """
    # Whoever recomputes, and whatever is compiled, does it in a backward.
    if torch._C._current_graph_task_id() == -1:
        places = ids.flatten().long() + 1
        counts.scatter_add_(0, places, torch.ones_like(places))


@add_picks.register_fake
def _(counts: Tensor, ids: Tensor) -> None:
    return None

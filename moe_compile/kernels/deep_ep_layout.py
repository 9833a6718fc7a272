"""What DeepEP wants to know of the picks before it sends: how many tokens and picks go where."""

import torch
from torch import Tensor


def dispatch_layout(ids: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ids [T, K] in -1..num_experts-1, where each rank owns an equal part of the experts.

    Returns:
        the tokens that go to each rank [R] int32, the picks of each expert [E] int32, and whether a
        token goes to a rank [T, R] bool: what DeepEP's `get_dispatch_layout` does.
    """
    if ids.is_cuda:
        from moe_compile.kernels import deep_ep_layout_kernel  # needs Triton

        return deep_ep_layout_kernel.dispatch_layout(ids, num_experts, ranks)
    owner = torch.where(ids >= 0, ids // (num_experts // ranks), -1)
    is_sent = (owner[:, :, None] == torch.arange(ranks)).any(1)
    per_expert = torch.bincount(ids[ids >= 0], minlength=num_experts).int()
    return is_sent.sum(0, dtype=torch.int32), per_expert, is_sent

"""The Triton kernel of `deep_ep_layout`; imported where there is a GPU.

It is deterministic: what programs add up are integers.
"""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.kernels.row_kernels import at_least_one

_TOKENS = 32
"""Tokens that one program counts."""


@triton.jit
def _layout(
    ids,
    per_rank,
    per_expert,
    is_sent,
    num_tokens,
    num_picks,
    num_experts,
    local,
    ranks: tl.constexpr,
    bins: tl.constexpr,
    size: tl.constexpr,
    picks: tl.constexpr,
):
    """Counts of a program's tokens are added to the others'."""
    token = tl.program_id(0) * size + tl.arange(0, size)
    pick = tl.arange(0, picks)[None, :]
    inside = (token[:, None] < num_tokens) & (pick < num_picks)
    own = tl.load(ids + token[:, None] * num_picks + pick, mask=inside, other=-1).to(tl.int32)
    for rank in tl.static_range(ranks):
        is_here = (own >= rank * local) & (own < (rank + 1) * local)
        goes = tl.max(is_here.to(tl.int32), axis=1)
        tl.store(is_sent + token * ranks + rank, goes.to(tl.int8), mask=token < num_tokens)
        tl.atomic_add(per_rank + rank, tl.sum(goes, axis=0), sem="relaxed")
    expert = tl.reshape(tl.where(own < 0, bins - 1, own), [size * picks])
    bin = tl.arange(0, bins)
    tl.atomic_add(
        per_expert + bin, tl.histogram(expert, bins), mask=bin < num_experts, sem="relaxed"
    )


def dispatch_layout(ids: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """`deep_ep_layout.dispatch_layout` on a GPU."""
    num_tokens, num_picks = ids.shape
    counts = torch.zeros(ranks + num_experts, dtype=torch.int32, device=ids.device)
    is_sent = torch.empty(num_tokens, ranks, dtype=torch.bool, device=ids.device)
    per_rank, per_expert = counts.split((ranks, num_experts))
    sizes = num_tokens, num_picks, num_experts, num_experts // ranks
    bins, width = triton.next_power_of_2(num_experts + 1), triton.next_power_of_2(num_picks)
    grid = (at_least_one(triton.cdiv(num_tokens, _TOKENS)),)
    outs = per_rank, per_expert, is_sent.view(torch.int8)
    _layout[grid](ids.contiguous(), *outs, *sizes, ranks, bins, _TOKENS, width)
    return per_rank, per_expert, is_sent

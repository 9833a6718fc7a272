"""What the tests of the dispatchers send: tokens and picks of every kind, and the experts."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.ops import experts

EXPERTS, PICKS, WIDTH = 8, 2, 16
CASES = ["even", "uneven", "one rank has no tokens", "no tokens", "one expert", "none picked"]


def tokens_of(case: str, rank: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Different tokens on each rank, with their picks, and the weights in float64."""
    counts = {"even": 6, "uneven": 3 + 50 * rank, "one rank has no tokens": 4 * rank}
    count = 0 if case == "no tokens" else counts.get(case, 5)
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(count, EXPERTS, generator=generator, dtype=torch.float64)
    weights, ids = scores.topk(PICKS)
    if case == "one expert":
        ids = torch.full_like(ids, 6).index_fill(1, torch.tensor([1]), -1)
    if case == "none picked":
        ids = torch.full_like(ids, -1)
    x = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
    return x.to(dtype), ids, weights


def parameters(hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The experts' two stacks, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    up = torch.randn(EXPERTS, WIDTH, hidden, generator=generator, dtype=torch.float64)
    down = torch.randn(EXPERTS, hidden, WIDTH, generator=generator, dtype=torch.float64)
    return up.to(dtype), down.to(dtype)


def group() -> str:
    """The name of the group of all ranks."""
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


def dense(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    """All experts on one rank."""
    return experts(x, ids, weights, up, down, torch.tanh)

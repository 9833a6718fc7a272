"""Counting picks: those that went nowhere are apart, and a backward adds none."""

from typing import Any

import torch
from torch import Tensor

from moe_compile.kernels.add_picks import add_picks


def test_counts_add_up() -> None:
    counts = torch.zeros(5, dtype=torch.int64)
    add_picks(counts, torch.tensor([[0, 3], [-1, 3]]))
    add_picks(counts, torch.tensor([[2, 0]], dtype=torch.int32))
    add_picks(counts, torch.empty(0, 2, dtype=torch.int64))
    assert counts.tolist() == [1, 2, 0, 1, 2]


class CountsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Tensor) -> Tensor:
        ctx.counts = counts
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        add_picks(ctx.counts, torch.tensor([[0, 1]]))
        return grads[0], None


def test_a_backward_counts_nothing() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    out = CountsInBackward.apply(torch.zeros(1, requires_grad=True), counts)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert counts.tolist() == [0, 0, 0]


def test_opcheck() -> None:
    counts, ids = torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 2], [1, -1]])
    torch.library.opcheck(add_picks, (counts, ids))

"""Experts with a norm after each, on two ranks: each has its own weight, or all share one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.blocks import HIDDEN, equals_one_process
from tests.ranks import on_ranks

EXPERTS, WIDTH = 4, 8


class Block(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.3)
        size = (HIDDEN,) if shared else (EXPERTS, HIDDEN)
        self.norm = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for e in range(EXPERTS):
            token, pick = torch.where(ids == e)
            rows = F.linear(F.silu(F.linear(tokens[token], self.up[e])), self.down[e])
            weight = self.norm if self.shared else self.norm[e]
            rows = weight * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6))
            out = out.index_add(0, token, rows * weights[token, pick, None])
        return out.view(x.shape)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_one_process(shared: bool) -> None:
    on_ranks(2, equals_one_process, functools.partial(Block, shared))

"""Experts that a model keeps as modules of their own, on two ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.blocks import HIDDEN, equals_one_process
from tests.ranks import on_ranks

EXPERTS = 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 8, bias=False)
        self.up = nn.Linear(HIDDEN, 8, bias=False)
        self.down = nn.Linear(8, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, pick = torch.where(ids == number)
            out = out.index_add(0, token, expert(tokens[token]) * weights[token, pick, None])
        return out.view(x.shape)


def test_each_rank_computes_its_own_experts() -> None:
    on_ranks(2, equals_one_process, Block)

"""An expert's capacity drops other tokens on each rank: those that it has too many of there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.blocks import HIDDEN, equals_one_process
from tests.ranks import on_ranks

EXPERTS, INNER, CAPACITY = 4, 8, 3


class Block(nn.Module):
    """Two picks of each token, as far as their experts have room."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens).softmax(-1).topk(2)
        hot, out = F.one_hot(ids, EXPERTS), torch.zeros_like(tokens)
        places = hot.reshape(-1, EXPERTS).cumsum(0).view(hot.shape)
        mask = hot * (places <= CAPACITY)
        for e in range(EXPERTS):
            token, pick = torch.where(mask[..., e])
            rows = F.linear(F.silu(F.linear(tokens[token], self.up[e])), self.down[e])
            out = out.index_add(0, token, rows * weights[token, pick, None])
        return out.view(x.shape)


def test_each_rank_drops_what_its_tokens_are_too_many_of() -> None:
    on_ranks(2, equals_one_process, Block)

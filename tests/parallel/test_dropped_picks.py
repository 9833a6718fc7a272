"""An expert's capacity drops other tokens on each rank: those that it has too many of there."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_compile
from tests.pairs import error
from tests.ranks import on_ranks

EXPERTS, HIDDEN, INNER, CAPACITY = 4, 16, 8, 3


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


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nn.Module, rank: int) -> Tensor:
    """Of other data, and another number of tokens, on each rank."""
    x = torch.randn(2, 5 + rank, HIDDEN, generator=torch.Generator().manual_seed(rank))
    return model(x).square().mean()


def equals_one_process() -> None:
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    moe_compile.optimize(model, mesh, example_inputs=(torch.randn(2, 8, HIDDEN),))
    (site,) = [s for s in moe_compile.report(model).sites if s.kind == "experts"]
    assert (site.status, site.provider) == ("rewritten", "all_to_all, torch")
    mine = loss(model, dist.get_rank())
    assert error(mine.detach(), loss(reference, dist.get_rank()).detach()) < 1e-5
    mine.backward()
    for rank in range(2):
        (loss(reference, rank) / 2).backward()
    for (name, own), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert isinstance(own.grad, DTensor)
        assert theirs.grad is not None
        assert error(own.grad.full_tensor(), theirs.grad) < 1e-5, name


def test_each_rank_drops_what_its_tokens_are_too_many_of() -> None:
    on_ranks(2, equals_one_process)

"""Experts that a model keeps as modules of their own, on two ranks."""

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

EXPERTS, HIDDEN = 4, 16


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
    loss(model, dist.get_rank()).backward()
    for rank in range(2):
        (loss(reference, rank) / 2).backward()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert isinstance(mine.grad, DTensor)
        assert theirs.grad is not None
        assert error(mine.grad.full_tensor(), theirs.grad) < 1e-5, name


def test_each_rank_computes_its_own_experts() -> None:
    on_ranks(2, equals_one_process)

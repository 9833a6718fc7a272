"""Blocks of a plain model on two ranks, against one process with the data of both."""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_compile
from tests.pairs import error

HIDDEN = 16


class Layer(nn.Module):
    """A block beside its residual."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Model(nn.Module):
    """Two layers."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(block()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nn.Module, rank: int) -> Tensor:
    """Of other data, and another number of tokens, on each rank."""
    x = torch.randn(2, 5 + rank, HIDDEN, generator=torch.Generator().manual_seed(rank))
    return model(x).square().mean()


def equals_one_process(block: Callable[[], nn.Module]) -> None:
    """The experts are spread; the loss and every gradient are those of one process."""
    torch.manual_seed(0)
    model = Model(block)
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

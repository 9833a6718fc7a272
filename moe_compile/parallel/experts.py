"""The experts' parameters on their ranks: sharded once, gathered over `dp_shard` at every use.

A parameter keeps its name and becomes a DTensor of (dp_replicate, ep, dp_shard): `ep` splits the
experts by id; `dp_shard` splits a rank's experts by id too where they divide, so that an optimizer
sees whole matrices, else their rows. FSDP2 leaves these parameters alone.

A rank's gradient of an expert is a sum over the tokens of its whole EP group. The mean of the
ranks' losses divides it by all ranks that have data; `local_weights` does so to each contribution.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from moe_compile.parallel.layout import Layout


def shard_experts(owner: nn.Module, names: list[str], layout: Layout) -> list[nn.Parameter]:
    """Replaces the named parameters of `owner` by this rank's shards; returns the new ones.

    Every rank holds the same full parameter before; the full one is let go of. Meta stays meta.
    """
    assert layout.experts is not None
    return [_shard_one(owner, name, layout.experts, layout.device) for name in names]


def _shard_one(owner: nn.Module, name: str, mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module = owner.get_submodule(path)
    full: nn.Parameter = getattr(module, leaf)
    shard = nn.Parameter(_distribute(full.detach(), mesh, device), full.requires_grad)
    vars(shard).update(vars(full))
    module.register_parameter(leaf, shard)
    return shard


def _distribute(full: Tensor, mesh: DeviceMesh, device: torch.device) -> DTensor:
    placements = placements_of(full, mesh)
    local = full
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            coordinate = mesh.get_local_rank(dim)
            parts = local.chunk(mesh.size(dim), placement.dim)
            none = local.narrow(placement.dim, 0, 0)
            local = parts[coordinate] if coordinate < len(parts) else none
    target = full.device if full.is_meta else device
    own = torch.empty(local.shape, dtype=full.dtype, device=target).copy_(local)
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=full.shape, stride=_contiguous(full.shape)
    )


def placements_of(full: Tensor, mesh: DeviceMesh) -> list[Placement]:
    """How a stack of experts lies on an experts' mesh."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    local = full.shape[0] // sizes["ep"]
    inner = Shard(0) if local % sizes.get("dp_shard", 1) == 0 else Shard(1)
    kinds: dict[str, Placement] = {"dp_replicate": Replicate(), "ep": Shard(0), "dp_shard": inner}
    return [kinds[name] for name in sizes]


def local_weights(weight: Tensor, data_ranks: int) -> Tensor:
    """A rank's own experts, whole: [E / ep, ...] of [E, ...]. Part of the installed graphs.

    A plain tensor is that of a single rank, which owns all experts.
    """
    if not isinstance(weight, DTensor):
        return weight
    names = weight.device_mesh.mesh_dim_names or ()
    whole: list[Placement] = [Shard(0) if name == "ep" else Replicate() for name in names]
    grads: list[Placement] = [Shard(0) if name == "ep" else Partial() for name in names]
    local = weight.redistribute(placements=whole).to_local(grad_placements=grads)
    own: Tensor = _ScaleGradient.apply(local, 1 / data_ranks)
    return own


class _ScaleGradient(torch.autograd.Function):
    """The identity; its backward multiplies by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))

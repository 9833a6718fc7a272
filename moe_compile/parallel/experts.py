"""The experts' parameters on their ranks: sharded once, gathered over `dp_shard` at every use.

A parameter keeps its name and becomes a DTensor of (dp_replicate, ep, dp_shard): `ep` splits the
experts by id; `dp_shard` splits a rank's experts by id too where they divide, so that an optimizer
sees whole matrices, else their rows. FSDP2 leaves these parameters alone.

A rank's gradient of an expert is a sum over the tokens of its whole EP group. The mean of the
ranks' losses divides it by all ranks that have data: `scale_gradient` divides the gradient of each
token's result before it travels to the experts, as nothing is smaller, and multiplies those of the
token and of its weights when they are back.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils.checkpoint import checkpoint

from moe_compile.kernels.all_to_all import process_group
from moe_compile.parallel.layout import Layout

_WEIGHTS = ("up", "down", "up_bias", "down_bias", "norm_weight")


def own_weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ops.experts`, tensors or nodes, that every rank has its own part of.

    A norm may have one weight for all experts, a vector: every rank has that.
    """
    given = {name: arguments[name] for name in _WEIGHTS if arguments[name] is not None}
    return {name: weight for name, weight in given.items() if _rank(weight) > 1}


def _rank(weight: Any) -> int:
    return (weight.meta["val"] if isinstance(weight, fx.Node) else weight).dim()


def own_experts(whole: Tensor, group: str) -> Tensor:
    """[E / ranks, ...] of [E, ...]: a rank's experts, where every rank has all of them.

    The gradient of the others is zero here, and their owners' is averaged with it.
    """
    ranks = process_group(group)
    count = whole.shape[0] // ranks.size()
    return whole.narrow(0, ranks.rank() * count, count)


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
    placements = placements_of(full, mesh)
    shard = nn.Parameter(distribute(full.detach(), mesh, placements, device), full.requires_grad)
    vars(shard).update(vars(full))
    module.register_parameter(leaf, shard)
    return shard


def distribute(
    full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], device: torch.device
) -> DTensor:
    """This rank's part of a tensor that every rank has, on its device; meta stays meta."""
    local = local_part(full, mesh, placements)
    target = full.device if full.is_meta else device
    own = torch.empty(local.shape, dtype=full.dtype, device=target).copy_(local)
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=full.shape, stride=_contiguous(full.shape)
    )


def local_part(full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """A view of what this rank keeps of a tensor."""
    local = full
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            coordinate = mesh.get_local_rank(dim)
            parts = local.chunk(mesh.size(dim), placement.dim)
            none = local.narrow(placement.dim, 0, 0)
            local = parts[coordinate] if coordinate < len(parts) else none
    return local


def placements_of(full: Tensor, mesh: DeviceMesh) -> list[Placement]:
    """How a stack of experts lies on an experts' mesh."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    local = full.shape[0] // sizes["ep"]
    inner = Shard(0) if local % sizes.get("dp_shard", 1) == 0 else Shard(1)
    kinds: dict[str, Placement] = {"dp_replicate": Replicate(), "ep": Shard(0), "dp_shard": inner}
    return [kinds[name] for name in sizes]


def on_own_experts(implementation: Callable[..., Tensor], data_ranks: int) -> Callable[..., Tensor]:
    """An implementation of `ops.experts` that takes each rank's shards of the weights, by keyword.

    The gradients that come here are divided by `data_ranks`; that of a parameter which every rank
    has, such as a norm's vector, is multiplied back. Plain weights are those of a single rank,
    which owns all experts. What was gathered over `dp_shard` is let go of after the forward, and
    gathered again in the backward.
    """

    def own_experts(**given: Any) -> Tensor:
        if not isinstance(given["up"], DTensor):
            return implementation(**given)
        stored = own_weights(given)
        shared = {
            name: scale_gradient(given[name], data_ranks)
            for name in _WEIGHTS
            if given.get(name) is not None and name not in stored
        }
        gathered: dict[int, DTensor] = {}
        with _let_go(gathered):
            own = {name: _gathered(weight, gathered) for name, weight in stored.items()}
            return implementation(**given | shared | own)

    return own_experts


def _gathered(weight: DTensor, gathered: dict[int, DTensor]) -> Tensor:
    """A rank's own experts, noted where they had to be gathered from others."""
    if not _is_gathered(weight):
        return whole_experts(weight)
    if torch.compiler.is_compiling():
        return checkpoint(whole_experts, weight, use_reentrant=False)
    own = whole_experts(weight)
    gathered[own.untyped_storage().data_ptr()] = weight
    return own


def _is_gathered(weight: DTensor) -> bool:
    return "dp_shard" in (weight.device_mesh.mesh_dim_names or ()) or weight.device_mesh.ndim > 1


def whole_experts(weight: DTensor) -> Tensor:
    """[E / ep, ...] of [E, ...]: a rank's experts, gathered from the ranks that share them.

    The gradient's parts are summed over those ranks, and over the replicas.
    """
    names = weight.device_mesh.mesh_dim_names or ()
    whole: list[Placement] = [Shard(0) if name == "ep" else Replicate() for name in names]
    grads: list[Placement] = [Shard(0) if name == "ep" else Partial() for name in names]
    return weight.redistribute(placements=whole).to_local(grad_placements=grads)


@contextlib.contextmanager
def _let_go(gathered: dict[int, DTensor]) -> Generator[None]:
    """Autograd keeps the shards in the place of what was gathered from them (by its address).

    The rest is left to hooks that are there already, as those of checkpointing: autograd would
    call the innermost alone. Inductor does all this by itself, for what `checkpoint` marks.
    """
    if torch.compiler.is_compiling():
        yield
        return
    hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    pack_other, unpack_other = hooks._top_saved_tensors_default_hooks(False) or (_same, _same)

    def pack(tensor: Tensor) -> Any:
        source = gathered.get(tensor.untyped_storage().data_ptr())
        if source is None or not source.numel():
            return _Other(pack_other(tensor))
        return source, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Other):
            return unpack_other(packed.value)
        source, shape, stride, offset = packed
        with torch.no_grad():
            return whole_experts(source).as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@dataclass(frozen=True)
class _Other:
    """What other hooks made of a saved tensor."""

    value: Any


def _same(value: Any) -> Any:
    return value


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by a number."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


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

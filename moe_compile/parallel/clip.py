"""Gradient clipping where parameters live on different meshes."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

_Axes = tuple[DeviceMesh | None, tuple[int, ...]]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their L2 norm, over all ranks, is at most `max_norm`.

    What `torch.nn.utils.clip_grad_norm_` gives in one process, for any mesh; all ranks must call
    it.

    Args:
        model: a model that was optimized on any mesh, or on none.
        max_norm: the largest norm allowed.

    Returns:
        The norm before scaling, a float32 scalar, the same on every rank.
    """
    parameters = list(model.parameters())
    squares = _squares(parameters, parameters[0].device)
    total = torch.stack(squares).sum().sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        _local(gradient).mul_(factor)
    return total.float()


def _squares(parameters: Iterable[nn.Parameter], device: torch.device) -> list[Tensor]:
    """For each set of ranks that gradients are spread over, the sum of their squares.

    The sets come from all parameters, so that a rank without gradients makes the same collectives.
    """
    local: dict[_Axes, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        found = local[_axes(parameter)]
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(_local(parameter.grad), dtype=torch.float32)
            found.append(norm.double().square())
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    return [_over_ranks(axes, sum(found, nothing)) for axes, found in local.items()]


def _axes(parameter: Tensor) -> _Axes:
    """The mesh dimensions over which a parameter is split."""
    if not isinstance(parameter, DTensor):
        return None, ()
    split = [dim for dim, p in enumerate(parameter.placements) if isinstance(p, Shard)]
    return parameter.device_mesh, tuple(split)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _over_ranks(axes: _Axes, total: Tensor) -> Tensor:
    mesh, dims = axes
    for dim in dims:
        assert mesh is not None
        dist.all_reduce(total, group=mesh.get_group(dim))
    return total

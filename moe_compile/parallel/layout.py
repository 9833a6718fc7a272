"""What a user's mesh means: who has other data, who shares parameters, who owns which experts."""

import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

NAMES = ("dp_replicate", "dp_shard", "ep")


@dataclass(frozen=True)
class ExpertParallel:
    """The ranks that share out the experts of a layer.

    Attributes:
        group: the name of their process group.
        size: how many they are.
        data_ranks: how many ranks have data, over all groups: a gradient is the mean over them.
        one_machine: whether all of them are on one machine.
        max_tokens: what each of them brings to a layer at most; None where nobody promised it.
    """

    group: str
    size: int
    data_ranks: int
    one_machine: bool
    max_tokens: int | None = None


@dataclass(frozen=True)
class Layout:
    """The meshes behind a user's mesh; every rank has data of its own.

    Attributes:
        sizes: the size of each of `NAMES`.
        data: what FSDP2 shards over: every rank, or (dp_replicate, every rank of one replica).
        experts: (dp_replicate, ep, dp_shard) without those of size 1; None without expert
            parallelism. `ep` is outside of `dp_shard`, so that both can split the experts by id.
        one_machine: whether the ranks that share this rank's experts are on one machine.
    """

    sizes: dict[str, int]
    data: DeviceMesh
    experts: DeviceMesh | None
    one_machine: bool

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return device_on(self.data)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.data.size()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None means those of the whole job."""
        return self.data.get_group() if self.data.ndim == 1 else None

    @property
    def rank(self) -> int:
        """This rank's place among all of them."""
        return dist.get_rank(self.group)

    def ep(self, max_tokens: int | None) -> ExpertParallel | None:
        """What graphs need to know of expert parallelism."""
        if self.experts is None:
            return None
        group: dist.ProcessGroup = self.experts.get_group("ep")
        sizes = self.sizes["ep"], self.ranks
        return ExpertParallel(group.group_name, *sizes, self.one_machine, max_tokens)


def layout_of(mesh: DeviceMesh | None) -> Layout | None:
    """The layout of a mesh with known names; None for one device. All ranks must call it."""
    if mesh is None or mesh.size() == 1:
        return None
    names = dimension_names(mesh)
    sizes = {name: mesh.size(names.index(name)) if name in names else 1 for name in NAMES}
    order = [names.index(name) for name in NAMES if name in names]
    ranks = mesh.mesh.permute(order).reshape(*sizes.values())
    data = _mesh(mesh.device_type, ranks.flatten(1), ("dp_replicate", "dp_shard"))
    if sizes["ep"] == 1:
        return Layout(sizes, data, None, one_machine=True)
    experts = _mesh(mesh.device_type, ranks.transpose(1, 2), ("dp_replicate", "ep", "dp_shard"))
    return Layout(sizes, data, experts, _are_on_one_machine(experts.get_group("ep")))


def whole_job(mesh: DeviceMesh | None) -> int:
    """How many ranks can talk before there is a layout: all that there are, or only this one."""
    if mesh is None or not dist.is_initialized() or mesh.size() != dist.get_world_size():
        return 1
    return mesh.size()


def _are_on_one_machine(group: dist.ProcessGroup) -> bool:
    names = [""] * group.size()
    dist.all_gather_object(names, socket.gethostname(), group=group)
    return len(set(names)) == 1


def device_on(mesh: DeviceMesh) -> torch.device:
    """This rank's device on a mesh."""
    kind = mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def dimension_names(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a mesh; without any, the one dimension that is larger than 1 means `ep`."""
    if mesh.mesh_dim_names is not None:
        return mesh.mesh_dim_names
    large = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(large) > 1:
        raise ValueError(
            f"the mesh got the shape {tuple(mesh.shape)} and no names; it takes names from "
            f"{', '.join(NAMES)}; pass mesh_dim_names to init_device_mesh"
        )
    fillers = iter(("dp_replicate", "dp_shard"))
    return tuple("ep" if dim in large else next(fillers, "") for dim in range(mesh.ndim))


def _mesh(device: str, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh without the dimensions of size 1."""
    kept = [dim for dim in range(ranks.dim()) if ranks.shape[dim] > 1]
    shape = [ranks.shape[dim] for dim in kept]
    kept_names = tuple(names[dim] for dim in kept)
    mesh = DeviceMesh(device, ranks.reshape(shape), mesh_dim_names=kept_names)
    for group in mesh.get_all_groups():
        _take_timeout(group, torch.device(device))
    return mesh


def _take_timeout(group: dist.ProcessGroup, device: torch.device) -> None:
    """Gives a group the job's timeout: torch gives it the default one, however short the job's."""
    world: Any = dist.group.WORLD
    options = getattr(world._get_backend(device), "options", None)
    if options is not None:
        _set_pg_timeout(options._timeout, group)

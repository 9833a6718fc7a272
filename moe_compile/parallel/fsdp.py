"""All that is not placed otherwise, over all ranks: `fully_shard` for each layer, and for the rest.

FSDP2 averages gradients over its ranks, which is the mean of the ranks' losses.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_compile.config import OptimizeConfig
from moe_compile.parallel.layout import Layout


def shard_data_parallel(
    model: nn.Module,
    names: list[str],
    placed: set[nn.Parameter],
    layout: Layout,
    config: OptimizeConfig,
) -> None:
    """Applies FSDP2 to the named layers and the model; `placed` are on their ranks already."""
    if config.fsdp is False:
        move(model, layout.device)
        return
    options: dict[str, Any] = {} if isinstance(config.fsdp, (bool, str)) else dict(config.fsdp)
    lists = {model.get_submodule(name): name.rpartition(".")[0] for name in names}
    units = joined_in_a_row(joined_by_ties(list(lists)), lists, config.layers_per_unit)
    for modules in (*units, [model]):
        fully_shard(modules, mesh=layout.data, ignored_params=placed, **options)


def joined_in_a_row(
    groups: list[list[nn.Module]], lists: Mapping[nn.Module, str], count: int
) -> list[list[nn.Module]]:
    """Groups of layers, joined with those before them of the same lists, up to `count` layers."""
    units: list[list[nn.Module]] = []
    for group in groups:
        last = units[-1] if units else []
        if {lists[n] for n in last} == {lists[n] for n in group} and len(last + group) <= count:
            units[-1] = last + group
        else:
            units.append(group)
    return units


def joined_by_ties(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Layers that have a parameter in common, as those of an encoder and a decoder, together.

    FSDP2 gathers what belongs together for the first of them, and lets go of it after the last.
    """
    homes: dict[nn.Module | nn.Parameter, list[nn.Module]] = {}
    for layer in layers:
        joined = [layer]
        for other in {id(homes[p]): homes[p] for p in layer.parameters() if p in homes}.values():
            joined = [*other, *joined]
        for each in joined:
            homes |= dict.fromkeys((each, *each.parameters()), joined)
    return list({id(group): group for group in homes.values()}.values())


def move(model: nn.Module, device: torch.device) -> None:
    """Moves all but shards to the device, as `fully_shard` does; what is on meta stays there."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def check_ties(model: nn.Module, layers: list[str]) -> None:
    """FSDP2 shards layers apart from the rest, so a parameter may not be part of both.

    Raises:
        ValueError: naming the parameters that are tied.
    """
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for tied in names.values():
        inside = [name for name in tied if any(name.startswith(f"{layer}.") for layer in layers)]
        outside = [name for name in tied if name not in inside]
        if inside and outside:
            raise ValueError(
                f"the model got {inside[0]} and {outside[0]}, which are one parameter; on several "
                "ranks it takes ties of layers, or outside of all layers; untie them"
            )

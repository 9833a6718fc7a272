"""Everything but the experts, over all ranks: one `fully_shard` for each layer, one for the rest.

FSDP2 averages gradients over its ranks, which is the mean of the ranks' losses.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_compile.config import OptimizeConfig
from moe_compile.parallel.layout import Layout


def shard_data_parallel(
    model: nn.Module,
    layers: list[nn.Module],
    experts: set[nn.Parameter],
    layout: Layout,
    config: OptimizeConfig,
) -> None:
    """Applies FSDP2 to the layers and the model; `experts` are left to their own ranks."""
    if config.fsdp is False:
        move(model, layout.device)
        return
    options: dict[str, Any] = {} if isinstance(config.fsdp, (bool, str)) else dict(config.fsdp)
    for module in (*layers, model):
        fully_shard(module, mesh=layout.data, ignored_params=experts, **options)


def move(model: nn.Module, device: torch.device) -> None:
    """Moves all but shards to the device, as `fully_shard` does; what is on meta stays there."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def check_ties(model: nn.Module, layers: list[str]) -> None:
    """FSDP2 shards each layer by itself, so a parameter may not be part of two of them.

    Raises:
        ValueError: naming the parameters that are tied.
    """
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for tied in names.values():
        homes = {next((x for x in layers if name.startswith(f"{x}.")), "") for name in tied}
        if len(homes) > 1:
            raise ValueError(
                f"the model got {tied[0]} and {tied[-1]}, which are one parameter; on several "
                "ranks it takes ties within a layer, or outside of all layers; untie them"
            )

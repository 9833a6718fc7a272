"""Everything but the experts, over all ranks: one `fully_shard` for each layer, one for the rest.

FSDP2 averages gradients over its ranks, which is the mean of the ranks' losses.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

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
        return
    options: dict[str, Any] = {} if isinstance(config.fsdp, (bool, str)) else dict(config.fsdp)
    for module in (*layers, model):
        fully_shard(module, mesh=layout.data, ignored_params=experts, **options)

"""Spreads an optimized model over its ranks.

Experts go to their owners, the rows of the token embedding where the tokens of a rank are bounded,
and the rest by FSDP2.
"""

from collections.abc import Mapping

import torch
from torch import nn

from moe_compile.adapters.accelerate import mark_prepared
from moe_compile.adapters.transformers import token_embedding
from moe_compile.capture.group import Group
from moe_compile.config import OptimizeConfig
from moe_compile.install.sites import Installation
from moe_compile.parallel.embedding import shard_embedding, should_stay
from moe_compile.parallel.experts import shard_experts
from moe_compile.parallel.fsdp import shard_data_parallel
from moe_compile.parallel.guard import forbid_additions
from moe_compile.parallel.layout import Layout
from moe_compile.parallel.watch import watch


def layer_names(groups: list[Group]) -> list[str]:
    """The units that are layers: children of a list."""
    names = [name for group in groups if not group.is_part for name in group.names]
    return [name for name in names if name.rpartition(".")[2].isdigit()]


def shard(
    model: nn.Module,
    groups: list[Group],
    installations: list[Installation],
    layout: Layout,
    config: OptimizeConfig,
) -> None:
    """Replaces the model's parameters by this rank's shards; names stay."""
    experts: set[nn.Parameter] = set()
    for installation in installations:
        names = dict.fromkeys(n for variant in installation.variants for n in variant.weights)
        for owner in map(model.get_submodule, installation.owner_names() if names else []):
            experts.update(shard_experts(owner, list(names), layout))
    if experts:
        # How many rows arrive is known only when they do.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
    placed = experts | _rows_of_the_embedding(model, layout, config)
    layers = set(layer_names(groups))  # of kinds, not in the order in which they run
    names = [name for name, _ in model.named_modules() if name in layers]
    shard_data_parallel(model, names, placed, layout, config)
    watch(model, names)
    forbid_additions(model)
    mark_prepared(model)


def _rows_of_the_embedding(
    model: nn.Module, layout: Layout, config: OptimizeConfig
) -> set[nn.Parameter]:
    """The token embedding's table, if FSDP2 can be spared it."""
    most = config.max_tokens_per_rank
    by_fsdp = isinstance(config.fsdp, Mapping) and "offload_policy" in config.fsdp
    if most is None or config.fsdp is False or by_fsdp:
        return set()
    embedding = token_embedding(model)
    if embedding is None or not should_stay(model, embedding, layout, most):
        return set()
    return {shard_embedding(embedding, layout, most)}

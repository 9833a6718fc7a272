"""A family's training step on several ranks against one process with the data of all of them."""

import copy
from typing import Any

import torch
import torch.distributed as dist

import moe_compile
from moe_compile import OptimizeConfig
from tests.parallel.models import optimized
from tests.zoo.entries import build, entry_of
from tests.zoo.inputs import call_of
from tests.zoo.steps import Values, step, worst_of


def worst_error(name: str) -> tuple[float, str, bool]:
    """On each rank: the largest relative error of its loss and of every gradient, and of which.

    And whether all experts are spread over the ranks.
    """
    entry = entry_of(name)
    model: Any = build(entry)
    reference = copy.deepcopy(model)
    # Autocast, and each rewrite, are verified where one process takes the step.
    config = OptimizeConfig(compile=False, verify="off", autocast=False)
    model = optimized(model, "all ep", config, everything=True)
    calls = [call_of(entry, seed=rank) for rank in range(dist.get_world_size())]
    found = step(model, calls[dist.get_rank()])
    worst, name = worst_of(found, _means([step(reference, call) for call in calls]))
    sites = [site for site in moe_compile.report(model).sites if site.kind == "experts"]
    spread = all("all_to_all" in (site.provider or "") for site in sites)
    return worst, name, spread


def _means(every: list[Values]) -> Values:
    """This rank's loss, and the mean of every gradient."""
    means = {name: torch.stack([v[name] for v in every]).mean(0) for name in every[0]}
    return means | {"loss": every[dist.get_rank()]["loss"]}

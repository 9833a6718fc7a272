"""A family's training step on several ranks against one process with the data of all of them."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import moe_compile
from tests.pairs import error
from tests.parallel.models import optimized
from tests.zoo.entries import build, entry_of
from tests.zoo.inputs import call_of, loss_of

Values = dict[str, Tensor]

_NEGLIGIBLE = 1e-6
"""Of the largest gradient: what is less is zero but for rounding, as of a bias of keys."""


def worst_error(name: str) -> tuple[float, str, bool]:
    """On each rank: the largest relative error of its loss and of every gradient, and of which.

    And whether all experts are spread over the ranks.
    """
    entry = entry_of(name)
    model: Any = build(entry)
    reference = copy.deepcopy(model)
    model = optimized(model, "all ep", everything=True)
    calls = [call_of(entry, seed=rank) for rank in range(dist.get_world_size())]
    found = _step(model, calls[dist.get_rank()])
    wanted = _means([_step(reference, call) for call in calls])
    floor = _NEGLIGIBLE * max(value.norm().item() for value in wanted.values())
    errors = {
        name: error(value, wanted[name])
        for name, value in found.items()
        if wanted[name].norm() > floor or value.norm() > floor
    }
    worst = max(errors, key=lambda name: errors[name])
    sites = [site for site in moe_compile.report(model).sites if site.kind == "experts"]
    spread = all("all_to_all" in (site.provider or "") for site in sites)
    return errors[worst], worst, spread


def _step(model: Any, call: dict[str, Any]) -> Values:
    model.zero_grad()
    loss = loss_of(model(**call))
    loss.backward()
    gradients = {n: _whole(_gradient(p)) for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | gradients


def _gradient(parameter: Tensor) -> Tensor:
    """Of an expert that no token picked, a model's own loop leaves none; it stands for zeros."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def _means(every: list[Values]) -> Values:
    """This rank's loss, and the mean of every gradient."""
    means = {name: torch.stack([v[name] for v in every]).mean(0) for name in every[0]}
    return means | {"loss": every[dist.get_rank()]["loss"]}

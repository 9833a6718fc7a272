"""A run's state as Distributed Checkpoint takes it: by name, as the tensors that are in use.

What is in a tuple is pickled as one, as Distributed Checkpoint does not look into tuples.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from moe_compile.checkpoint.rng import rng_state, set_rng_state

State = dict[str, Any]


def run_state(
    model: nn.Module,
    optimizers: list[Optimizer],
    scheduler: Stateful | None,
    rank: int,
    *,
    frozen: bool,
) -> State:
    """What is saved of a run, with or without the parameters that are not trained."""
    unused = [each for each in optimizers if not any(each.state.values())]
    parameters, kept = _in_use(model, optimizers, frozen=frozen)
    for each in unused:  # torch has made them a step, to find out what they will keep
        own: State = dict(get_optimizer_state_dict(model, each))
        _forget(kept, own["state"])
        each.state.clear()
    state: State = {"model": parameters, "optimizer": kept}
    state["rng"] = {str(rank): rng_state(device_of(model))}
    if scheduler is not None:
        state["scheduler"] = (copy.deepcopy(scheduler.state_dict()),)
    return state


def state_to_fill(
    model: nn.Module,
    optimizers: list[Optimizer],
    scheduler: Stateful | None,
    rank: int,
    saved: Metadata,
) -> State:
    """What a state is loaded into; the optimizers start afresh, with all that they will keep.

    Raises:
        ValueError: naming what the saved state and the run do not have in common.
    """
    for each in optimizers:
        each.zero_grad()
        each.state.clear()
    parameters, kept = _in_use(model, optimizers)
    trained, _ = _in_use(model, [], frozen=False)
    for name in parameters.keys() - trained.keys():
        if f"model.{name}" not in saved.state_dict_metadata:
            del parameters[name]
    state: State = {"model": parameters, "optimizer": kept, "rng": {str(rank): ()}}
    if scheduler is not None:
        state["scheduler"] = ()
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, saved)
    _check(planner.state_dict, saved)
    # A parameter that never had a gradient.
    _forget(kept, {n for n in kept["state"] if not _has_any(f"optimizer.state.{n}.", saved)})
    return state


def fill(
    model: nn.Module, optimizers: list[Optimizer], scheduler: Stateful | None, state: State
) -> None:
    """Hands out what was loaded."""
    kept = state["optimizer"]
    every = {name for group in kept["param_groups"] for name in group["params"]}
    _forget(kept, every - kept["state"].keys())
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=kept,
        options=StateDictOptions(strict=False),
    )
    if scheduler is not None:
        scheduler.load_state_dict(*state["scheduler"])
    for generators in filter(None, state["rng"].values()):
        set_rng_state(generators, device_of(model))


def _in_use(
    model: nn.Module, optimizers: list[Optimizer], *, frozen: bool = True
) -> tuple[State, State]:
    """What there is of parameters, and what optimizers keep of them."""
    options = StateDictOptions(ignore_frozen_params=not frozen)
    found: tuple[Any, Any] = get_state_dict(model, optimizers, options=options)
    return found


def _forget(kept: State, names: Iterable[str]) -> None:
    """Leaves nothing of what an optimizer keeps of some parameters."""
    kept["state"] = kept["state"] | {name: {} for name in names}


def _has_any(prefix: str, saved: Metadata) -> bool:
    return any(key.startswith(prefix) for key in saved.state_dict_metadata)


_OPTIONAL = ("optimizer.", "rng.")
"""What a run may have, and its saved state not."""


def _check(wanted: State, saved: Metadata) -> None:
    found = saved.state_dict_metadata
    problems = [f"{name} was not saved" for name in wanted if _is_missing(name, found)]
    problems += [f"{name} is not in the run" for name in found if _is_extra(name, wanted)]
    for name, tensor in wanted.items():
        entry = found.get(name)
        if isinstance(entry, TensorStorageMetadata) and tensor.shape != entry.size:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, saved {tuple(entry.size)}")
    if problems:
        raise ValueError(
            "load_state got a state that does not fit:\n  "
            + "\n  ".join(problems[:20])
            + "\nit takes that of the same model, optimizer and scheduler; build them alike"
        )


def _is_missing(name: str, found: State) -> bool:
    return name not in found and not name.startswith(_OPTIONAL)


def _is_extra(name: str, wanted: State) -> bool:
    return name not in wanted and name.startswith(("model.", "optimizer.state."))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device

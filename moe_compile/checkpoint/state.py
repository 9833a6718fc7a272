"""The state of a training run, in the format of torch's Distributed Checkpoint, for any mesh.

Every rank writes its own shards. Parameters, and what an optimizer keeps of them, are stored by
name as parts of whole tensors, so that a run goes on with another number of ranks, or another
split of the experts. Generators of random numbers are stored for each rank.
"""

import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from moe_compile.checkpoint.by_name import State, fill, run_state, state_to_fill
from moe_compile.checkpoint.steps import StepFolder, clear_leftovers, complete_steps
from moe_compile.parallel.agree import meet, on_every_rank

_Optimizers = Optimizer | Iterable[Optimizer]


def save_state(
    folder: str | Path,
    model: nn.Module,
    optimizer: _Optimizers,
    *,
    step: int,
    scheduler: Stateful | None = None,
    frozen: bool = True,
    asynchronous: bool = False,
) -> Future[Any]:
    """Saves all that a run needs to go on, in `folder/step-N`; every rank of the job calls it.

    The state is there as a whole, on the disk, or not at all: a save that is killed leaves those
    of earlier steps as they were. The folder is one run's own, and all ranks must see it.

    Args:
        folder: has a folder for each step that was saved; made where it does not exist.
        model: optimized or not, on any mesh.
        optimizer: that of the model's parameters, or several.
        step: how many steps were made; one that was saved already is replaced.
        scheduler: of learning rates, or anything else with a `state_dict` that is the same on all
            ranks.
        frozen: whether to save parameters that are not trained; without them, the model that a
            state is loaded into has to have them already, as that under new adapters has.
        asynchronous: whether to write in the background, once the state has been copied to the
            CPU. The next save or load waits until it is written, and raises its error.

    Returns:
        A future that is done once the state is on the disk; it holds the save's error, if any.

    Raises:
        ValueError: for a step below 0.
        RuntimeError: after two minutes, where not every rank calls it.
        CheckpointException: from torch, on every rank, where a rank could not write.
    """
    if step < 0:
        raise ValueError(
            f"save_state got step={step}; it takes how many steps were made, 0 or more; count them"
        )
    group = _together("save_state")
    place = StepFolder(Path(folder), step)

    def prepare() -> State:
        if _rank() == 0:
            clear_leftovers(place.root)
        return run_state(model, _several(optimizer), scheduler, _rank(), frozen=frozen)

    state = on_every_rank("save_state", prepare, _ranks(), group)
    options: dict[str, Any] = {"storage_writer": _Writer(place), "process_group": group}
    done: Future[Any]
    if asynchronous:
        done = _as_future(async_save(state, no_dist=group is None, **options))
        _in_flight.append(done)
        return done
    done = Future()
    done.set_result(save(state, no_dist=group is None, **options))
    return done


def load_state(
    folder: str | Path,
    model: nn.Module,
    optimizer: _Optimizers,
    *,
    scheduler: Stateful | None = None,
    step: int | None = None,
) -> int:
    """Goes on from what `save_state` saved, on this mesh or any other; every rank calls it.

    Generators of random numbers go on on the ranks that there were; those of more ranks are left
    alone. Torch unpickles parts of a state: load only your own.

    Args:
        folder: what `save_state` got.
        model: the same model, on any mesh; with memory, so not on the meta device.
        optimizer: one like the one saved, new or not, or several.
        scheduler: one like the one saved.
        step: which state; the latest that is complete by default.

    Returns:
        The number of steps that were made; 0 where nothing was saved yet.

    Raises:
        ValueError: for a step that is not there, for a state of another model or optimizer, and for
            a model on the meta device.
        RuntimeError: after two minutes, where not every rank calls it.
    """
    group = _together("load_state")
    found = _from_first(complete_steps(Path(folder)), group)
    if step is None and not found:
        return 0
    place = StepFolder(Path(folder), found[-1] if step is None else step)
    if place.step not in found:
        raise ValueError(
            f"load_state got step={step}, and {folder} has the steps {found}; it takes one of "
            "them, or None for the latest"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "load_state got a model on the meta device; it takes one with memory; call "
            "load_pretrained before, and make the optimizer afterwards"
        )
    optimizers = _several(optimizer)
    reader = FileSystemReader(place.complete)

    def prepare() -> State:
        saved = reader.read_metadata()
        return state_to_fill(model, optimizers, scheduler, _rank(), saved)

    state = on_every_rank("load_state", prepare, _ranks(), group)
    load(
        state,
        storage_reader=reader,
        planner=DefaultLoadPlanner(allow_partial_load=True),  # what may be missing was checked
        process_group=group,
        no_dist=group is None,
    )
    fill(model, optimizers, scheduler, state)
    return place.step


class _Writer(FileSystemWriter):
    """Writes beside a step's folder, and renames when the last rank has written."""

    def __init__(self, place: StepFolder) -> None:
        super().__init__(place.unfinished)
        self._place = place

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Runs on one rank, after all have written; its error is raised on all."""
        super().finish(metadata, results)
        self._place.publish()


_in_flight: list[Future[Any]] = []
_groups: dict[str, dist.ProcessGroup] = {}


def _together(what: str) -> dist.ProcessGroup | None:
    """Waits for the save in flight, and for all ranks; returns the group that saves talk in.

    It is a group of their own, as a save in the background talks while the model trains.
    """
    while _in_flight:
        _in_flight.pop().result()
    if _ranks() == 1:
        # Torch says so each time; a save in the background would escape a filter for the call.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        return None
    meet(what, None)
    world: Any = dist.group.WORLD
    name: str = world.group_name
    if name not in _groups:
        group: Any = dist.new_group(backend="gloo")
        _groups[name] = group
    return _groups[name]


def _as_future(saving: Any) -> Future[Any]:
    """Torch returns a pair of futures where the copying is asynchronous too."""
    return saving if isinstance(saving, Future) else saving.upload_completion


def _from_first(steps: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """What rank 0 sees: another one may see a folder later."""
    said: list[Any] = [steps]
    if group is not None:
        dist.broadcast_object_list(said, group=group, group_src=0)
    return said[0]


def _several(optimizer: _Optimizers) -> list[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

"""Two ranks are killed while they save: what was saved before loads, or what they were saving."""

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.checkpoint.save import bind_save
from moe_compile.parallel.fsdp import shard_data_parallel
from moe_compile.parallel.layout import layout_of
from tests.families import build
from tests.ranks import start_ranks

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 8}


def constant(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Makes every value the number, so that a mixture can be told."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    with torch.no_grad():
        for tensor in (*model.parameters(), *kept):
            local(tensor).fill_(number)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def values(tensors: list[Tensor]) -> set[float]:
    return {value for tensor in tensors for value in local(tensor).detach().unique().tolist()}


def trained(model: Any) -> torch.optim.Optimizer:
    """An optimizer that has something to keep."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def sharded(model: Any) -> Any:
    """What optimize makes of a model with no experts for it: that is quicker to kill often."""
    layout = layout_of(init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))
    assert layout is not None
    shard_data_parallel(model, [], set(), layout, OptimizeConfig())
    bind_save(model, layout)
    return model


def save_state(folder: Path, model: Any, optimizer: Any, number: int) -> None:
    moe_compile.save_state(folder, model, optimizer, step=number)


def save_in_the_background(folder: Path, model: Any, optimizer: Any, number: int) -> None:
    moe_compile.save_state(folder, model, optimizer, step=number, asynchronous=True).result()


def save_pretrained(folder: Path, model: Any, optimizer: Any, number: int) -> None:
    model.save_pretrained(folder, max_shard_size="100KB")


def saved_state(folder: Path) -> set[float]:
    """The values of the latest state that loads."""
    model: Any = build("mixtral", **SMALL)
    optimizer = trained(model)
    step = moe_compile.load_state(folder, model, optimizer)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return {float(step)} | values([*model.parameters(), *kept])


def saved_model(folder: Path) -> set[float]:
    """The values of the model that loads."""
    return values(list(AutoModelForCausalLM.from_pretrained(folder).parameters()))


def save(how: Callable[..., None], folder: Path, number: int) -> None:
    """What a rank does: it says when it begins to save, and when it has saved."""
    model = sharded(build("mixtral", **SMALL))
    optimizer = trained(model)
    constant(model, optimizer, number)
    dist.barrier()
    (folder.parent / f"begun-{dist.get_rank()}").touch()
    how(folder, model, optimizer, number)
    (folder.parent / f"ended-{dist.get_rank()}").touch()


def wait_for(path: Path, processes: list[Any]) -> float:
    """The time at which a rank says something."""
    while not path.exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.001)
    return path.stat().st_mtime


def kill(processes: list[multiprocessing.Process], chance: random.Random) -> None:
    """Together, as a machine dies, or one after the other."""
    for process in chance.sample(processes, 2):
        process.kill()
        time.sleep(chance.choice((0, 0.02)))


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("how", "saved"),
    [
        (save_state, saved_state),
        pytest.param(save_in_the_background, saved_state, marks=pytest.mark.long),
        (save_pretrained, saved_model),
    ],
)
def test_killed_saves(
    tmp_path: Path, how: Callable[..., None], saved: Callable[[Path], set[float]], kills: int
) -> None:
    """Until so many kills came before the end of a save, and what was there before loads."""
    chance = random.Random(kills)
    folder = tmp_path / "saved"
    with start_ranks(2, save, how, folder, 1) as (processes, _):
        begun = wait_for(tmp_path / "begun-0", processes)
        seconds = wait_for(tmp_path / "ended-0", processes) - begun
    assert saved(folder) == {1}
    before, interrupted, number = 1.0, 0, 1
    while interrupted < kills:
        number += 1
        assert number < 8 * kills, "most kills come too late"
        for note in (*tmp_path.glob("begun-*"), *tmp_path.glob("ended-*")):
            note.unlink()
        with start_ranks(2, save, how, folder, number) as (processes, _):
            wait_for(tmp_path / "begun-0", processes)
            time.sleep(chance.uniform(0, 1.5 * seconds))
            kill(processes, chance)
        (value,) = saved(folder)
        assert value in (before, number)
        interrupted += value != number
        before = value
    print(f"{number - 1} kills in saves of {seconds:.2f} s: {kills} times the one before loads")

"""A run that goes on from a saved state is the run that was never interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import moe_compile
from moe_compile.checkpoint.steps import StepFolder, complete_steps
from tests.checkpoint.runs import Run, differences, draws
from tests.families import build
from tests.pairs import inputs
from tests.ranks import on_ranks


def uninterrupted(mesh: str, folder: Path, **adamw: Any) -> None:
    """Saves while the run goes on; another run goes on from there."""
    run = Run(mesh, **adamw)
    run.train(2)
    saved = run.whole()
    saving = run.save(folder, 2, asynchronous=True)
    expected = run.train(2, first=2), draws(), run.whole()
    saving.result()
    other = Run(mesh, seed=1, **adamw)
    other.train(1)
    assert other.load(folder) == 2
    assert differences(other.whole(), saved) == []
    losses = other.train(2, first=2), draws()
    assert losses == expected[:2]
    assert differences(other.whole(), expected[2]) == []


def test_one_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    uninterrupted("", tmp_path)


def two_ranks(folder: Path) -> None:
    uninterrupted("ep", folder / "foreach", foreach=True)
    uninterrupted("dp_shard", folder / "fused", fused=True)


def test_two_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    on_ranks(2, two_ranks, tmp_path)


def hand_over(mesh: str, folder: Path, step: int) -> None:
    """Goes on from the state before, which is whole, trains one step, and saves."""
    run = Run(mesh, seed=step)
    assert run.load(folder) == step
    noted = folder / f"whole-{step}"
    if step:
        assert differences(run.whole(), torch.load(noted, weights_only=False)) == []
    run.train(1, first=step)
    run.save(folder, step + 1)
    after = run.whole()
    if not mesh or dist.get_rank() == 0:
        torch.save(after, folder / f"whole-{step + 1}")


@pytest.mark.parametrize(
    "path",
    [
        [("", 1), ("ep", 2)],
        pytest.param([("ep", 2), ("all ep", 4), ("", 1)], marks=pytest.mark.matrix),
        pytest.param(
            [("dp_shard x ep", 4), ("ep", 2), ("dp_shard", 2), ("", 1), ("all ep", 4), ("ep", 2)],
            marks=pytest.mark.long,
        ),
        pytest.param(
            [("dp_replicate x dp_shard x ep", 8), ("", 1), ("dp_replicate x ep", 4)],
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_state_moves_to_other_meshes_bit_for_bit(
    tmp_path: Path, path: list[tuple[str, int]]
) -> None:
    for step, (mesh, ranks) in enumerate([*path, path[0]]):
        if mesh:
            on_ranks(ranks, hand_over, mesh, tmp_path, step)
        else:
            hand_over(mesh, tmp_path, step)


def errors(folder: Path) -> None:
    run = Run("ep")
    run.train(1)
    run.save(folder, 1)
    with pytest.raises(ValueError, match=r"got step=-1; it takes how many"):
        run.save(folder, -1)
    with pytest.raises(ValueError, match=r"got step=3, and .* has the steps \[1\]; it takes one"):
        run.load(folder, step=3)
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"exp_avg is not in the run"):
        moe_compile.load_state(folder, run.model, sgd)
    (folder / "file").touch()
    with pytest.raises(
        (OSError, RuntimeError), match="File exists"
    ):  # rank 0's own, or what it said
        run.save(folder / "file", 1)
    saving = run.save(folder, 2, asynchronous=True)
    run.save(folder, 1)  # once more; it waits for the one before
    assert saving.done()
    assert complete_steps(folder) == [1, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepFolder, "publish", lambda self: self.final / "nothing" / 0)
        run.save(folder, 3, asynchronous=True)
        with pytest.raises(CheckpointException, match="unsupported operand"):
            run.load(folder)
    assert run.load(folder) == 2


def unstepped(folder: Path) -> None:
    """Saving changes nothing, also where an optimizer keeps nothing yet."""
    run = Run("ep")
    run.save(folder, 0)
    assert not run.optimizer.state
    expected = run.train(2), run.whole()
    other = Run("ep", seed=1)
    other.train(1)
    assert other.load(folder, step=0) == 0
    assert (other.train(2), other.whole())[0] == expected[0]
    assert differences(other.whole(), expected[1]) == []


def at_the_edges(folder: Path) -> None:
    unstepped(folder / "first")
    errors(folder)


def test_the_first_step_and_errors(tmp_path: Path) -> None:
    on_ranks(2, at_the_edges, tmp_path)


def with_several_optimizers(seed: int) -> tuple[Any, list[torch.optim.Optimizer]]:
    """One parameter is frozen, one has never a gradient."""
    model = build("mixtral", num_hidden_layers=1, seed=seed)
    model.register_parameter("unused", torch.nn.Parameter(torch.full((3,), float(seed))))
    model.lm_head.weight.requires_grad_(False)
    parameters = list(model.parameters())
    sgd = torch.optim.SGD(parameters[::2], lr=0.01, momentum=0.9)
    return model, [sgd, torch.optim.AdamW(parameters[1::2])]


def test_several_optimizers_and_parameters_without_gradients(tmp_path: Path) -> None:
    model, optimizers = with_several_optimizers(0)
    model(**inputs()).loss.backward()
    for each in optimizers:
        each.step()
    moe_compile.save_state(tmp_path / "all", model, optimizers, step=1)
    moe_compile.save_state(tmp_path / "trained", model, optimizers, step=1, frozen=False)
    for folder, loads_all in (("all", True), ("trained", False)):
        other, others = with_several_optimizers(1)
        assert moe_compile.load_state(tmp_path / folder, other, others) == 1
        for name, parameter in model.named_parameters():
            loaded = loads_all or parameter.requires_grad
            assert torch.equal(parameter, other.get_parameter(name)) == loaded, name
        for each, copied in zip(optimizers, others, strict=True):
            kept, found = each.state_dict()["state"], copied.state_dict()["state"]
            assert {n: s for n, s in found.items() if s}.keys() == kept.keys()
            assert [n for n in kept if differences(kept[n], found[n])] == []


def test_a_model_without_memory(tmp_path: Path) -> None:
    model, optimizers = with_several_optimizers(0)
    moe_compile.save_state(tmp_path, model, optimizers, step=1)
    with pytest.raises(ValueError, match=r"on the meta device; it takes one with memory; call"):
        moe_compile.load_state(tmp_path, model.to("meta"), optimizers)

"""Trainers on two ranks save and resume through their own flags, and train as one process does."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

import moe_compile
from moe_compile.adapters.trainer import last_finished
from tests.parallel.models import optimized, small
from tests.ranks import on_ranks
from tests.trainers import logs_of, trainer_of
from tests.trl_trainer import trl_trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")

Logs = list[dict[str, float]]


class OnRanks(moe_compile.TrainerMixin, Trainer):
    """As docs/distributed.md says."""


class TrlOnRanks(moe_compile.TrainerMixin, SFTTrainer):
    """The same for TRL."""


OPTIONS: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
ALONE: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4}
BEST: dict[str, Any] = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_only_model": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 3,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # so that the best one is not the last
}
BEST_ALONE: dict[str, Any] = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 6}


def model_of(seed: int = 0) -> Any:
    return small(seed=seed)


def lora_model(seed: int = 0) -> Any:
    """Adapters on one base: only they are different with another seed."""
    base = small()
    config = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data.fill_(0.01 * (number % 5 - 2) + 0.1 * seed)
    return model


WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "trainer": (trainer_of, OnRanks, model_of),
    "lora": (trainer_of, OnRanks, lora_model),
    "trl": (trl_trainer_of, TrlOnRanks, model_of),
    "trl_lora": (trl_trainer_of, TrlOnRanks, lora_model),
}


def test_resumes_from_the_last_checkpoint_that_was_finished(tmp_path: Path) -> None:
    """A save that is killed leaves no file that is written last, or a part of it."""
    options = OPTIONS | {"save_steps": 1}
    whole = logs_of(trainer_of(model_of(), tmp_path, kind=OnRanks, **options))
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"epoch":')
    assert last_finished(tmp_path) == str(tmp_path / "checkpoint-2")
    assert logs_of(trainer_of(model_of(seed=1), tmp_path, kind=OnRanks, **options), True) == whole


def test_nothing_to_resume_from_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_of(model_of(), tmp_path, kind=OnRanks, **OPTIONS)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint that was finished; it takes one"):
        trainer.train(resume_from_checkpoint=True)


def train_and_resume(folder: Path, way: str) -> Logs:
    trainer_of, kind, make = WAYS[way]
    whole = logs_of(trainer_of(optimized(make(), "ep"), folder, kind=kind, **OPTIONS))
    other = trainer_of(optimized(make(seed=1), "ep"), folder, kind=kind, **OPTIONS)
    assert len(whole) == 4
    assert logs_of(other, folder / "checkpoint-2") == whole
    return whole


def train_and_go_back(folder: Path, way: str) -> float:
    """The best loss that was evaluated; the run is also resumed, from weights alone."""
    trainer_of, kind, make = WAYS[way]
    trainer = trainer_of(optimized(make(), "ep"), folder, kind=kind, **BEST)
    whole = logs_of(trainer)
    first = folder / "checkpoint-1"
    assert not (first / "state").exists()
    assert trainer.state.best_model_checkpoint == str(first)
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert losses[0] == trainer.state.best_metric > losses[1]
    assert trainer.evaluate()["eval_loss"] == losses[0]
    other = trainer_of(optimized(make(seed=1), "ep"), folder, kind=kind, **BEST)
    assert logs_of(other, first)[1]["loss"] == whole[1]["loss"]
    return losses[0]


def every_way(folder: Path) -> dict[str, tuple[Logs, float]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29534")
    return {
        way: (train_and_resume(folder / way, way), train_and_go_back(folder / f"{way}-best", way))
        for way in WAYS
    }


def check_near(logs: Logs, references: Logs) -> None:
    for mine, theirs in zip(logs, references, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.matrix
def test_trainers_save_and_resume_on_two_ranks(tmp_path: Path) -> None:
    """Bit for bit; with the losses of one process; and one process takes over."""
    ranks = on_ranks(2, every_way, tmp_path)
    for way in WAYS:
        check_alone(tmp_path / "alone" / way, way, [each[way] for each in ranks])
    model = moe_compile.optimize(model_of(seed=1))
    taken_over = trainer_of(model, tmp_path / "taken", kind=OnRanks, **ALONE)
    resumed = logs_of(taken_over, tmp_path / "trainer" / "checkpoint-2")
    check_near(resumed, logs_of(trainer_of(model_of(), tmp_path / "alone", **ALONE)))


def check_alone(folder: Path, way: str, ranks: list[tuple[Logs, float]]) -> None:
    start, _, make = WAYS[way]
    wanted = logs_of(start(make(), folder, **ALONE))
    evaluated = start(make(), folder, **BEST | BEST_ALONE)
    evaluated.train()
    # When it evaluates, TRL weighs ranks that have unequal numbers of tokens as with DDP.
    error = 2e-3 if start is trl_trainer_of else 1e-4
    for logs, best in ranks:
        check_near(logs, wanted)
        assert best == pytest.approx(evaluated.state.best_metric, rel=error)

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
from tests.parallel.models import optimized, small
from tests.ranks import on_ranks
from tests.trainers import trainer_logs
from tests.trl_trainer import trl_logs

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")

Logs = list[dict[str, float]]


class OnRanks(moe_compile.TrainerMixin, Trainer):
    """As docs/distributed.md says."""


class TrlOnRanks(moe_compile.TrainerMixin, SFTTrainer):
    """The same for TRL."""


OPTIONS: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
ALONE: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4}


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


WAYS: dict[str, tuple[Callable[..., Logs], Callable[..., Any], Callable[..., Any]]] = {
    "trainer": (trainer_logs, OnRanks, model_of),
    "lora": (trainer_logs, OnRanks, lora_model),
    "trl": (trl_logs, TrlOnRanks, model_of),
}


def train_and_resume(folder: Path, way: str) -> Logs:
    logs_of, kind, make = WAYS[way]
    whole = logs_of(optimized(make(), "ep"), folder, kind=kind, **OPTIONS)
    other = optimized(make(seed=1), "ep")
    resumed = logs_of(other, folder, kind=kind, resume=folder / "checkpoint-2", **OPTIONS)
    assert len(whole) == 4
    assert resumed == whole
    return whole


def every_way(folder: Path) -> dict[str, Logs]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29534")
    return {way: train_and_resume(folder / way, way) for way in WAYS}


def check_near(logs: Logs, references: Logs) -> None:
    for mine, theirs in zip(logs, references, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.matrix
def test_trainers_save_and_resume_on_two_ranks(tmp_path: Path) -> None:
    """Bit for bit; with the losses of one process; and one process takes over."""
    for logs in on_ranks(2, every_way, tmp_path):
        for way, (logs_of, _, make) in WAYS.items():
            check_near(logs[way], logs_of(make(), **ALONE))
    model = moe_compile.optimize(model_of(seed=1))
    taken_over = trainer_logs(
        model, kind=OnRanks, resume=tmp_path / "trainer" / "checkpoint-2", **ALONE
    )
    check_near(taken_over, trainer_logs(model_of(), **ALONE))

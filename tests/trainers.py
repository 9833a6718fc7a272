"""The losses of three steps in a Trainer of Hugging Face's."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.pairs import token_ids

ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def trainer_losses(model: Any, *, rows: int = 6) -> list[float]:
    """With transformers' Trainer, on token ids."""
    examples = [{"input_ids": row, "labels": row} for row in token_ids(rows, 10)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **ARGUMENTS)
        return losses_of(Trainer(model, arguments, train_dataset=examples))  # type: ignore[arg-type]


SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 1e6,
    "train_sampling_strategy": "sequential",
}
"""With AdamW a step would be the same for gradients that are all too large."""


def trainer_logs(
    model: Any,
    *,
    kind: Callable[..., Trainer] = Trainer,
    folder: Path | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Loss and gradient norm of each step, on rows that have different numbers of labels."""
    with tempfile.TemporaryDirectory() as own:
        return logs_of(trainer_of(model, folder or Path(own), kind=kind, **options))


def trainer_of(
    model: Any, folder: Path, *, kind: Callable[..., Trainer] = Trainer, **options: Any
) -> Trainer:
    """Trains and evaluates on rows that have different numbers of labels."""
    rows = token_ids(12, 10)
    examples = [
        {"input_ids": row, "labels": unlabelled(row, 3 * i % 8)} for i, row in enumerate(rows)
    ]
    arguments = TrainingArguments(str(folder), **ARGUMENTS | options)
    return kind(model, arguments, train_dataset=examples, eval_dataset=examples)


def logs_of(trainer: Any, resume: Path | bool | None = None) -> list[dict[str, float]]:
    """Trains, and returns loss and gradient norm of each step, those before a resumption too."""
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    kept = ("loss", "grad_norm")
    return [{n: entry[n] for n in kept} for entry in trainer.state.log_history if "loss" in entry]


def unlabelled(row: Tensor, count: int) -> Tensor:
    """The row without its first labels."""
    return row.masked_fill(torch.arange(len(row)) < count, -100)


def losses_of(trainer: Any) -> list[float]:
    """Trains, and returns what was logged."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

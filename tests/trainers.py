"""The losses of three steps in a Trainer of Hugging Face's."""

import tempfile
from typing import Any

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


def losses_of(trainer: Any) -> list[float]:
    """Trains, and returns what was logged."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

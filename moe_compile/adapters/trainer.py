"""Hugging Face's Trainer, and those made from it, with checkpoints of models on several ranks.

Trainer saves on rank 0 alone, what rank 0 has. The names that are overridden here are private to
transformers, but for `save_model`; where one of them is gone, Trainer does what it does by itself,
and `save_pretrained` says that the other ranks did not come.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_compile.adapters.checkpoints import has_adapters, is_wrapper
from moe_compile.adapters.transformers import is_pretrained
from moe_compile.checkpoint.adapters import load_adapters
from moe_compile.checkpoint.load import load_pretrained
from moe_compile.checkpoint.state import load_state, save_state

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_FOLDER = "state"
_WRITTEN_LAST = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class TrainerMixin(_Trainer):
    """Lets every rank take part in a Trainer's checkpoints, and in resuming from them.

    class Trainer(moe_compile.TrainerMixin, transformers.Trainer): ...

    A checkpoint's folder has what `save_pretrained` writes, and in `state` what a run needs to go
    on, for any mesh: see `moe_compile.save_state`. Under PEFT only what is trained is in `state`.
    """

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains as Trainer does; True resumes from the last checkpoint that was finished.

        Raises:
            ValueError: none was.
        """
        if resume_from_checkpoint is True:
            folder = self.args.output_dir
            resume_from_checkpoint = last_finished(Path(folder or ""))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"Trainer got resume_from_checkpoint=True, and {folder} has no checkpoint that "
                    "was finished; it takes one; leave it out to begin anew"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as Trainer does; every rank calls it, as Trainer's own loop does."""
        if self.args.should_save:
            super().save_model(output_dir, _internal_call)
        else:
            model: Any = self.model
            model.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(
            Path(output_dir, _FOLDER),
            self._own_model(),
            self._own_optimizer(),
            step=self.state.global_step,
            scheduler=self._own_scheduler(),
            frozen=not _is_wrapped(self._own_model()),
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights come with the optimizer's state, where there is one."""
        if not Path(resume_from_checkpoint, _FOLDER).is_dir():
            _load_weights(model or self._own_model(), resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = Path(checkpoint or "", _FOLDER)
        if checkpoint is None or not folder.is_dir():
            return
        own: Any = self._own_model(), self._own_optimizer()
        if not load_state(folder, *own, scheduler=self._own_scheduler()):
            raise ValueError(
                f"Trainer got {checkpoint} to resume from, which was not finished; it takes a "
                "whole checkpoint; resume from the one before, as resume_from_checkpoint=True does"
            )

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        _load_weights(self._own_model(), best)

    def _own_model(self) -> nn.Module:
        model: Any = self.model
        return model

    def _own_scheduler(self) -> Any:
        return self.lr_scheduler

    def _own_optimizer(self) -> Any:
        """Without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


def last_finished(folder: Path) -> str | None:
    """The checkpoint of the most steps in a Trainer's folder whose save was not cut off."""
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    finished = filter(_is_finished, found)
    last = max(finished, key=lambda path: int(path.name.partition("-")[2]), default=None)
    return None if last is None else str(last)


def _is_finished(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _WRITTEN_LAST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _is_wrapped(model: nn.Module) -> bool:
    return is_pretrained(model) and is_wrapper(model)


def _load_weights(model: nn.Module, folder: str) -> None:
    """What `save_pretrained` wrote: the model, or its adapters alone."""
    if has_adapters(model):
        load_adapters(model, Path(folder))
    else:
        load_pretrained(model, folder)

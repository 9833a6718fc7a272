"""A callback of transformers' Trainer that calls a function after each step of the optimizer."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Stepping(TrainerCallback):
    """Calls a function after each step of the optimizer."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, before gradients are cleared."""
        self.step()

"""The errors of loss and gradients as cells of a table; how they are measured: tests/parity.py."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.pairs import Pair
from tests.parity import errors, too_large

FLOORS = {torch.float32: 1e-5, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}


@dataclass(frozen=True)
class Differences:
    """Relative L2 errors, the new model's and the original's: the loss, and the worst gradient.

    `wrong` names what has more than twice the original's error, and more than `FLOORS` allows.
    """

    loss: tuple[float, float]
    gradient: tuple[float, float]
    wrong: list[str]

    def cells(self) -> tuple[str, str]:
        """Both errors as `new (original)`."""
        loss, gradient = (f"{new:.1e} ({own:.1e})" for new, own in (self.loss, self.gradient))
        return loss, gradient + (f" OFF: {self.wrong[0]}" if self.wrong else "")


def differences(original: Any, optimized: Any, ids: Tensor) -> Differences:
    """Compares both models with the original in float64, on the same rows."""
    call = {"input_ids": ids, "labels": ids, "use_cache": False}
    found = errors(Pair(original, optimized), call)
    wrong = list(too_large(found, FLOORS[next(original.parameters()).dtype]))
    gradients = [both for name, both in found.items() if name not in ("loss", "logits")]
    return Differences(found["loss"], max(gradients), wrong)

"""Short training runs: their state, whole, and the losses with which they go on."""

import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import moe_compile
from tests.checkpoint.folders import QUICK
from tests.families import build
from tests.pairs import inputs
from tests.parallel.models import optimized


class Run:
    """A model in training; its dropout uses up random numbers."""

    def __init__(self, mesh: str | None, seed: int = 0, **adamw: Any) -> None:
        torch.manual_seed(seed)
        model = build("mixtral", attention_dropout=0.1, seed=seed)
        self.model = (
            optimized(model, mesh, QUICK) if mesh else moe_compile.optimize(model, config=QUICK)
        )
        parameters = list(self.model.parameters())
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, **adamw)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 0.9**step)

    def train(self, steps: int, first: int = 0) -> list[float]:
        return [self._step(first + number) for number in range(steps)]

    def _step(self, number: int) -> float:
        rank = dist.get_rank() if dist.is_initialized() else 0
        loss = self.model(**inputs(seed=100 * number + rank)).loss
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path, step: int, **options: Any) -> Any:
        return moe_compile.save_state(
            folder, self.model, self.optimizer, step=step, scheduler=self.scheduler, **options
        )

    def load(self, folder: Path, **options: Any) -> int:
        return moe_compile.load_state(
            folder, self.model, self.optimizer, scheduler=self.scheduler, **options
        )

    def whole(self) -> dict[str, Any]:
        """Every tensor by name, whole and apart from the run's own; and the numbers."""
        found: dict[str, Any] = {"scheduler": self.scheduler.state_dict()["last_epoch"]}
        names = {p: n for n, p in self.model.named_parameters()}
        for parameter, name in names.items():
            found[name] = whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name} {key}"] = whole(value)
        for group in self.optimizer.param_groups:
            values = {key: value for key, value in group.items() if key != "params"}
            found |= {f"{names[parameter]} group": values for parameter in group["params"]}
        return found


def whole(value: Tensor) -> Tensor:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone()


def draws() -> list[float]:
    """What the generators give next."""
    return [random.random(), numpy.random.random(), torch.rand(()).item()]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not _same(one[name], other[name])]


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other

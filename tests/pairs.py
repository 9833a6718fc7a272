"""Optimized models beside their untouched originals, each made once in a session."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import build

COMPILED = OptimizeConfig(compile={"backend": "aot_eager"})


@dataclass(frozen=True)
class Pair:
    """Two models with equal weights: one untouched, one optimized."""

    original: Any
    optimized: Any

    def copies(self) -> "Pair":
        """Copies that a test may change."""
        return Pair(copy.deepcopy(self.original), copy.deepcopy(self.optimized))


def make_pair(model: nn.Module, config: OptimizeConfig | None = None, **options: Any) -> Pair:
    original = copy.deepcopy(model)
    return Pair(original, moe_compile.optimize(model, config=config, **options))


def pair(
    family: str, dtype: torch.dtype = torch.float32, *, compiled: bool = False, **options: Any
) -> Pair:
    """The pair of a family; shared, so a test that changes it takes `copies()`."""
    return _pair(family, dtype, compiled, tuple(options.items()))


@functools.cache
def _pair(
    family: str, dtype: torch.dtype, compiled: bool, options: tuple[tuple[str, Any], ...]
) -> Pair:
    """A cache of its own: to `functools.cache`, a default that is given is another call."""
    return make_pair(build(family, dtype, **dict(options)), COMPILED if compiled else None)


def token_ids(batch: int = 2, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 2, length: int = 10, seed: int = 0) -> dict[str, Any]:
    """A training call; without a cache, which would run uncompiled."""
    ids = token_ids(batch, length, seed)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def step(model: nn.Module, **call: Any) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one call."""
    model.zero_grad()
    result = model(**call)
    logits = result.logits.detach()
    result.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": result.loss.detach(), "logits": logits} | gradients


def error(value: Tensor, reference: Tensor) -> float:
    """The relative L2 error."""
    reference = reference.double().cpu()
    difference = (value.double().cpu() - reference).norm().item()
    norm = reference.norm().item()
    return difference / norm if norm > 0 else difference


def check_close(
    values: dict[str, Tensor], references: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert values.keys() == references.keys()
    errors = {name: error(value, references[name]) for name, value in values.items()}
    wrong = {n: e for n, e in errors.items() if not e <= tolerance}
    assert wrong == {}, wrong

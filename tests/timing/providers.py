"""Providers of a norm for tests: one that takes its time, one that fails."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_compile.ops import CanonicalOp, experts, rms_norm
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.refuse import Refuse


@dataclass(frozen=True)
class Sleeper:
    """The reference after a sleep; counts its calls."""

    name: str
    seconds: float
    package: str | None = None
    calls: list[str] = field(default_factory=list[str], hash=False, compare=False)

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        return None if op is rms_norm else Lacks(f"{self.name} does not compute {op.name}")

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            self.calls.append(op.name)
            time.sleep(self.seconds)
            return rms_norm.reference(*args, **kwargs)

        return run


class Broken(Sleeper):
    """Takes calls that it then fails at."""

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            raise RuntimeError("no kernel image\nfor this device")

        return run


class Wordy(Sleeper):
    """Refuses experts, on every rank in its own words."""

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        return (
            Refuse(f"it cannot be loaded: rank {dist.get_rank()}") if op is experts else Lacks("")
        )


SLOW, FAST = 0.02, 0.0

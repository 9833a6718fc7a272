"""What a provider of canonical ops must answer, and how it is told of a call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.rewrite.refuse import Refuse


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an op, with fake tensors where the graph passes tensors.

    `autocast` is the dtype of the autocast that the call runs under, or None; `ep` the ranks that
    share the experts, or None where each has all of them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    autocast: torch.dtype | None = None
    ep: ExpertParallel | None = None

    def arguments(self, op: CanonicalOp[..., Any]) -> dict[str, Any]:
        """Every argument of `op` by name, defaults included."""
        return op.arguments(*self.args, **self.kwargs)


class Lacks(Refuse):
    """A provider has nothing of its own for an op, or for a device: nobody would expect it to."""


class Provider(Protocol):
    """A source of implementations of canonical ops."""

    @property
    def name(self) -> str:
        """What a user writes in `OptimizeConfig.providers`."""
        ...

    @property
    def package(self) -> str | None:
        """The distribution that it needs beside torch; timings are of one version of it."""
        ...

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """None when this provider takes the call, else why it does not; `Lacks` for the op."""
        ...

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """Why a model's own spelling of `op` is as fast, or None when it is worth rewriting."""
        ...

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """A function with `op`'s signature, for calls which `supports` takes."""
        ...

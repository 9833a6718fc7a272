"""Experts by quack's grouped products for Hopper, where the package `quack-kernels` is installed.

They gather the tokens' rows, and those of their gradients, while they multiply. What is between
the products is the torch provider's.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_compile import ops
from moe_compile.kernels.quack import NAME, library
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.expert_blocks import block_of, block_problem, block_refusal
from moe_compile.providers.provider import Call
from moe_compile.rewrite.refuse import Refuse

_ALIGNED = 8
"""Widths are multiples of it: rows of bfloat16 then start at multiples of 16 bytes."""


@dataclass(frozen=True)
class QuackProvider:
    """quack's kernels as custom ops, so that no layer's graph breaks."""

    name: str = NAME
    package: str | None = "quack-kernels"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse what its kernels do not compute, with the reason."""
        return block_refusal(self.name, op, call, _problem)

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """Where it is chosen, it was faster."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        assert op is ops.experts
        return block_of(NAME)


def _problem(arguments: dict[str, Any], device: torch.device) -> str | None:
    return (
        block_problem(arguments, (torch.bfloat16,))
        or _widths_problem(arguments)
        or _import_problem()
        or _device_problem(device)
    )


def _widths_problem(arguments: dict[str, Any]) -> str | None:
    for name in ("up", "down"):
        sizes = arguments[name].shape[1:]
        if any(size % _ALIGNED for size in sizes):
            text = " x ".join(map(str, sizes))
            return f"it takes widths that are multiples of {_ALIGNED}: {name} is {text}"
    return None


@functools.cache  # what failed halfway may fail in other words, or not, the next time
def _import_problem() -> str | None:
    try:
        library()
    except Exception as error:  # a release for another cutlass fails in its own ways
        return f"it needs the package quack, whose import fails: {error}; install quack-kernels"
    return None


def _device_problem(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0):
        return None
    return f"its tiles here are for compute capability 9.0: got {'.'.join(map(str, capability))}"

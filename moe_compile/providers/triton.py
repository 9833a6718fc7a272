"""Experts by kernels of our own, in Triton, which comes with torch for CUDA."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_compile import ops
from moe_compile.kernels.gathered_products import NAME
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.expert_blocks import block_of, block_problem, block_refusal
from moe_compile.providers.provider import Call
from moe_compile.rewrite.refuse import Refuse

_SHARED_MEMORY = 160 * 1024
"""What an A100 has, and all later GPUs for servers; other ones have less than the tiles take."""


@dataclass(frozen=True)
class TritonProvider:
    """Products that gather the tokens' rows while they multiply, as custom ops."""

    name: str = NAME
    package: str | None = None

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
    dtypes = torch.bfloat16, torch.float16
    return block_problem(arguments, dtypes) or _device_problem(device)


def _device_problem(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not there; install torch for CUDA"
    memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    if memory >= _SHARED_MEMORY:
        return None
    return f"its tiles take {_SHARED_MEMORY} bytes of a multiprocessor's memory: got {memory}"

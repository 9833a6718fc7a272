"""RMSNorm and SwiGLU by Liger's Triton kernels, where the package `liger_kernel` is installed.

Its rotary kernel turns queries and keys at once, in place: the canonical op has one tensor.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.liger import library, liger_rms_norm, liger_swiglu
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.normal_form import aten
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import Region

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WIDTH = 65536


def _rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_first: bool = False,
    offset: float = 0.0,
) -> Tensor:
    return liger_rms_norm(x, weight, eps, offset, cast_first)[0]


def _gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    gated = liger_swiglu(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias))
    return F.linear(gated, down, down_bias)


_IMPLEMENTATIONS: dict[CanonicalOp[..., Any], Callable[..., Any]] = {
    ops.gated_mlp: _gated_mlp,
    ops.rms_norm: _rms_norm,
}


@dataclass(frozen=True)
class LigerProvider:
    """Liger's kernels as custom ops, so that no layer's graph breaks."""

    name: str = "liger"
    package: str | None = "liger-kernel"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse what its kernels do not compute, with the reason."""
        if op not in _IMPLEMENTATIONS:
            return Lacks(f"liger has no implementation of {op.name}")
        arguments = call.arguments(op)
        if arguments["x"].device.type != "cuda":
            return Lacks(f"liger takes tensors on cuda: got {arguments['x'].device.type}")
        own = _norm_problem if op is ops.rms_norm else _mlp_problem
        problem = _dtype_problem(arguments["x"].dtype) or own(arguments) or _import_problem()
        return None if problem is None else Refuse(problem)

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """Where it is chosen, it was faster."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _IMPLEMENTATIONS[op]


@functools.cache  # what failed halfway may fail in other words, or not, the next time
def _import_problem() -> str | None:
    try:
        library("rms_norm")
    except Exception as error:  # a release for another triton fails in its own ways
        return (
            f"it needs the package liger_kernel, whose import fails: {error}; install liger-kernel"
        )
    return None


def _dtype_problem(dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"it takes bfloat16, float16 and float32: got {dtype}"


def _norm_problem(arguments: dict[str, Any]) -> str | None:
    x, weight = arguments["x"], arguments["weight"]
    if x.shape[-1] > _MAX_WIDTH:
        return f"it takes rows of up to {_MAX_WIDTH}: got {x.shape[-1]}"
    if not arguments["cast_first"] or weight is None:
        return None
    # The product of what was rounded and a wider weight is wide: it would round that again.
    if arguments["offset"] or weight.dtype != x.dtype:
        return f"it rounds to {x.dtype} at the end: the scale here is wider"
    return None


def _mlp_problem(arguments: dict[str, Any]) -> str | None:
    if arguments["gate"].shape[0] > _MAX_WIDTH:
        return f"it takes rows of up to {_MAX_WIDTH}: got {arguments['gate'].shape[0]}"
    if not _is_silu(arguments["activation"]):
        return "its gated MLP has silu: the activation here is another"
    return None


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    if not isinstance(activation, Region):
        return False
    called = [node.target for node in activation.graph.nodes if node.op == "call_function"]
    return called == [aten.silu.default]

"""RMSNorm and FP8 linears by TransformerEngine, where `transformer_engine` is installed.

Its attention is cuDNN's, which torch's has too; its grouped products are several times slower than
torch's for many experts, and its other modules break a layer's graph.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels import transformer_engine_fp8 as te_fp8
from moe_compile.kernels.transformer_engine import library, te_rms_norm
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.ops.fp8 import Recipe
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.refuse import Refuse

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    cast_first: bool = False,
    offset: float = 0.0,
) -> Tensor:
    return te_rms_norm(x, weight, eps, offset == 1.0)[0]


_IMPLEMENTATIONS: dict[CanonicalOp[..., Any], Callable[..., Any]] = {
    ops.fp8_linear: te_fp8.fp8_linear,
    ops.rms_norm: _rms_norm,
}

_GROUPED = (
    "its grouped FP8 products take the groups' sizes from the host, so every layer would wait for "
    "the device"
)


@dataclass(frozen=True)
class TransformerEngineProvider:
    """TransformerEngine's kernels as custom ops, so that no layer's graph breaks."""

    name: str = "transformer_engine"
    package: str | None = "transformer_engine"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse what its kernels do not compute, with the reason."""
        is_fp8 = op is ops.experts and call.kwargs.get("recipe") is not None
        if is_fp8 and call.arguments(op)["x"].is_cuda:
            return Refuse(_GROUPED)
        if op not in _IMPLEMENTATIONS:
            return Lacks(f"transformer_engine has no implementation of {op.name}")
        arguments = call.arguments(op)
        if arguments["x"].device.type != "cuda":
            kind = arguments["x"].device.type
            return Lacks(f"transformer_engine takes tensors on cuda: got {kind}")
        own = _linear_problem if op is ops.fp8_linear else _norm_problem
        problem = own(call.autocast, **arguments) or _import_problem()
        return None if problem is None else Refuse(problem)

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """Where it is chosen, it was faster."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _IMPLEMENTATIONS[op]


def _linear_problem(
    autocast: torch.dtype | None, x: Tensor, weight: Tensor, bias: Any, recipe: Recipe
) -> str | None:
    return te_fp8.problem(autocast or x.dtype, weight, recipe)


def _norm_problem(
    autocast: torch.dtype | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_first: bool,
    offset: float,
) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it takes bfloat16, float16 and float32: got {x.dtype}"
    if weight is None:
        return "it takes norms with a weight: this one has none"
    if weight.dtype != x.dtype:
        return f"it takes a weight in x's dtype, {x.dtype}: got {weight.dtype}"
    # With an offset, the product of what was rounded first and the scale is float32.
    if offset not in (0.0, 1.0) or (offset and cast_first):
        return f"it adds 1 or nothing to the weight, and rounds at the end: got {offset}"
    return None


@functools.cache  # what failed halfway may fail in other words, or not, the next time
def _import_problem() -> str | None:
    try:
        library()
    except Exception as error:  # builds for another CUDA or torch fail in their own ways
        return (
            "it needs the package transformer_engine, whose import fails: "
            f"{error}; install a build for this CUDA and torch"
        )
    return None

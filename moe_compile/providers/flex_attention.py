"""Attention by torch's flex_attention: masks, windows and sinks in a fused kernel.

It is one kernel in compiled layers alone. Elsewhere this is what the provider `torch` computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.flex_attention import flexible_attention, is_flexible, is_fused
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Call, Lacks
from moe_compile.providers.torch import attention
from moe_compile.rewrite.refuse import Refuse


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    form: dict[str, Any] = {"causal": causal, "window": window}
    if is_fused(query) and is_flexible(query, key, value, mask, dropout=dropout, **form):
        return flexible_attention(query, key, value, mask, sinks, scale=scale, **form)
    return attention(query, key, value, mask, sinks, scale=scale, dropout=dropout, **form)


@dataclass(frozen=True)
class FlexAttentionProvider:
    """Attention that SDPA has no fast kernel for: with a mask, a window or sinks."""

    name: str = "flex_attention"
    package: str | None = None

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse what its kernel does not compute, or is not needed for."""
        if op is not ops.attention:
            return Lacks(f"flex_attention has no implementation of {op.name}")
        given = call.arguments(op)
        query, mask, window = given["query"], given["mask"], given["window"]
        if query.device.type != "cuda":
            return Lacks(f"flex_attention is fused on cuda: got {query.device.type}")
        if given["sinks"] is None and window is None:
            is_bias = mask is not None and mask.is_floating_point()
            if mask is None or is_bias:
                return Lacks("SDPA has a kernel for it, or a query may see nothing at all")
        if call.autocast is None and not is_flexible(**_named(given)):
            return Refuse("flex_attention takes half precision, and heads as wide as powers of two")
        return None

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """Where it is chosen, it was faster."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _attention


def _named(given: dict[str, Any]) -> dict[str, Any]:
    names = ("query", "key", "value", "mask", "causal", "window", "dropout")
    return {name: given[name] for name in names}

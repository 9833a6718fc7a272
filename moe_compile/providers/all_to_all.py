"""Dispatch and combine by `all_to_all_single`: on every device, dtype and number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.all_to_all import all_to_all_combine, all_to_all_dispatch
from moe_compile.kernels.all_to_all_pairs import DISPATCHER
from moe_compile.kernels.pairs import implementations
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.refuse import Refuse


def _dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    # The collective wants the sizes on the host, whatever is known of the largest.
    sent = all_to_all_dispatch(x, ids, weights, num_experts, group)
    rows, ids, weights, places, *handle = sent
    return rows, ids, weights, places, handle


def _combine(y: Tensor, handle: list[Tensor], num_tokens: int, group: str) -> Tensor:
    return all_to_all_combine(y, None, *handle, num_tokens, group)[0]


_IMPLEMENTATIONS: dict[CanonicalOp[..., Any], Callable[..., Any]] = {
    ops.dispatch: _dispatch,
    ops.combine: _combine,
    **implementations(DISPATCHER),
}


@dataclass(frozen=True)
class AllToAllProvider:
    """Torch's own collectives, over NCCL or gloo."""

    name: str = "all_to_all"
    package: str | None = None

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Takes every call of the ops of expert parallelism."""
        return None if op in _IMPLEMENTATIONS else Lacks(f"all_to_all does not compute {op.name}")

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """No model dispatches by itself."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _IMPLEMENTATIONS[op]

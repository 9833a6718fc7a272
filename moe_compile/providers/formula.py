"""Formulas in plain torch, which Inductor fuses: what kernels must be faster than to be chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.fp8 import fp8_grouped_linear
from moe_compile.kernels.grouped_mm import grouped_linear, mask_tail
from moe_compile.ops import fp8
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.ops.experts import normed
from moe_compile.providers.provider import Call, Lacks
from moe_compile.providers.torch import TorchProvider, has_norm_kernel
from moe_compile.rewrite.refuse import Refuse


def _experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    norm: Callable[..., Tensor] | None = None,
    norm_weight: Tensor | None = None,
    transposed: bool = False,
    weigh_input: bool = False,
    places: Tensor | None = None,
    recipe: fp8.Recipe | None = None,
) -> Tensor:
    """The products are `grouped_mm` here too; rows are sorted, gathered and summed by torch."""
    num_experts, picks = up.shape[0], ids.shape[1]
    linear = grouped_linear if recipe is None else partial(fp8_grouped_linear, recipe=recipe)
    # -1, a pick that lives elsewhere, becomes E, which sorts last; those rows may hold anything.
    expert, order = (ids.flatten() % (num_experts + 1)).sort(stable=True)
    bounds = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    offs = torch.searchsorted(expert, bounds, right=True).int()
    weight = mask_tail(weights.reshape(-1, 1).index_select(0, order), offs)
    rows = mask_tail(x.index_select(0, order // picks), offs)
    if weigh_input:
        rows = (rows * weight).to(x.dtype)
    rows = linear(rows.to(up.dtype), up, offs, not transposed)
    if up_bias is not None:
        rows = rows + _of_rows(up_bias, expert)
    rows = linear(activation(rows).to(down.dtype), down, offs, not transposed)
    if down_bias is not None:
        rows = rows + _of_rows(down_bias, expert)
    if norm is not None:
        if norm_weight is not None and norm_weight.dim() == 2:
            norm_weight = _of_rows(norm_weight, expert)
        # The gradient of a weight for all experts sums all rows, so none may hold just anything.
        rows = normed(mask_tail(rows, offs), norm, norm_weight)
    rows = mask_tail(rows if weigh_input else rows * weight, offs)
    own = rows.index_select(0, order.argsort()).view(-1, picks, rows.shape[1])
    return own.sum(dim=1).to(x.dtype)


def _of_rows(vectors: Tensor, expert: Tensor) -> Tensor:
    """The vector of each row's expert; zero for the rows of none."""
    return F.pad(vectors, (0, 0, 0, 1)).index_select(0, expert)


_IMPLEMENTATIONS: dict[CanonicalOp[..., Any], Callable[..., Any]] = {
    ops.experts: _experts,
    ops.normed_rotary: ops.normed_rotary.reference,
    ops.rms_norm: ops.rms_norm.reference,
    ops.top_k: ops.top_k.reference,
}
"""Those of which the provider `torch` has something else."""


@dataclass(frozen=True)
class FormulaProvider:
    """Where torch has a kernel, the same in plain torch: compiled, it may be faster."""

    name: str = "formula"
    package: str | None = None

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Takes what the provider `torch` computes in another way."""
        if op not in _IMPLEMENTATIONS:
            return Lacks(f"formula has no implementation of {op.name}")
        if op is ops.rms_norm:
            arguments = call.arguments(op)
            if not has_norm_kernel(arguments["x"], arguments["weight"], arguments["offset"]):
                return Lacks("formula is what torch computes here too")
        return TorchProvider().supports(op, call)

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """Models spell their norms and experts in slower ways."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _IMPLEMENTATIONS[op]

"""Torch's own kernels: the provider that is always there, and the yardstick of the others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels import top_k
from moe_compile.kernels.expert_block import sum_of_experts
from moe_compile.kernels.expert_parts import (
    arrange_weights,
    bias_rows,
    experts_of_rows,
    weighed,
)
from moe_compile.kernels.expert_rows import collect_rows, group_picks, spread_rows
from moe_compile.kernels.fp8 import (
    experts_problem,
    fp8_grouped_linear,
    fp8_linear,
    linear_problem,
)
from moe_compile.kernels.grouped_mm import grouped_linear, mask_tail
from moe_compile.kernels.grouped_products import NAME
from moe_compile.kernels.linear_cross_entropy import linear_cross_entropy
from moe_compile.kernels.normed_rotary import misfit, normed_rotary
from moe_compile.ops import fp8
from moe_compile.ops.attention import band
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.ops.experts import normed
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.refuse import Refuse


def _rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_first: bool = False,
    offset: float = 0.0,
) -> Tensor:
    if has_norm_kernel(x, weight, offset):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return ops.rms_norm.reference(x, weight, eps, cast_first=cast_first, offset=offset)


def has_norm_kernel(x: Tensor, weight: Tensor | None, offset: float) -> bool:
    """Whether `F.rms_norm` computes this norm."""
    return not offset and (weight is None or weight.dtype == x.dtype)


def _restrict(mask: Tensor | None, seen: Tensor) -> Tensor:
    """`mask`, of either kind, which also hides what is not `seen`."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def _sink_bias(mask: Tensor | None, sinks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The float mask of [B, Hq, S, L + 1] logits whose last column is the sink's."""
    bias = sinks.new_zeros(shape[2:]) if mask is None else mask
    if bias.dtype == torch.bool:
        bias = sinks.new_zeros(bias.shape).masked_fill(~bias, float("-inf"))
    sink = sinks[:, None, None].expand(*shape[:3], 1)
    return torch.cat((bias.expand(shape), sink), dim=-1)


class _BySequence(torch.autograd.Function):
    """x[B, H, S, D]; its gradient is laid out as [B, S, H, D], in whatever layout it comes.

    torch 2.11 keeps cuDNN's backward graphs by the strides of query, key and value, and forgets
    those of the gradient: another layout of it, for the same shapes, gives wrong gradients. This is
    the layout that it nearly always has, since what follows attention is a projection.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].transpose(1, 2).contiguous().transpose(1, 2)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        # No fused kernel on CUDA takes both grouped heads and a mask.
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=groups > 1 and mask is None,
    )
    return _BySequence.apply(out) if out.is_cuda else out


def attention(
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
    """`ops.attention` by `scaled_dot_product_attention`, where one of its kernels is right."""
    if sinks is None and mask is not None and mask.dtype != torch.bool:
        # A fused backward recomputes the weights from a log-sum-exp. In a row that a mask fills
        # with the dtype's minimum, that has lost the logarithm: the gradient is L times too large.
        return ops.attention.reference(
            query,
            key,
            value,
            mask,
            sinks,
            scale=scale,
            causal=causal,
            window=window,
            dropout=dropout,
        )
    if sinks is None and mask is None and window is None:
        return _sdpa(query, key, value, None, scale, causal, dropout)
    shape = (*query.shape[:3], key.shape[2])
    if causal or window is not None:
        mask = _restrict(mask, band(shape[2], shape[3], window, query.device))
    if sinks is not None:
        # A sink is a key of zeros with the sink for its mask and a value of zeros. Against a
        # softmax written out in torch this is 1.3 times as fast in float32 on a CPU, and 8 times
        # in bfloat16 at half the error. No backend of it returns a log-sum-exp with a gradient.
        mask = _sink_bias(mask, sinks, shape)
        key, value = (F.pad(t, (0, 0, 0, 1)) for t in (key, value))
    return _sdpa(query, key, value, mask, scale, False, dropout)


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
    if norm is None and not weigh_input and recipe is None:
        given = x, ids, weights, up, down, activation, up_bias, down_bias
        return sum_of_experts(NAME, *given, transposed=transposed, places=places)
    linear = grouped_linear if recipe is None else partial(fp8_grouped_linear, recipe=recipe)
    num_experts, picks = up.shape[0], ids.shape[1]
    num_rows = None if places is None else places.shape[0]
    grouped = order, _, offs = group_picks(ids, num_experts, num_rows)
    weight = arrange_weights(weights, *grouped)
    rows = spread_rows(x, *grouped, picks)
    if weigh_input:
        rows = (rows * weight).to(x.dtype)
    rows = linear(rows.to(up.dtype), up, offs, not transposed)
    expert = experts_of_rows(ids, num_experts, order)
    if up_bias is not None:
        rows = rows + bias_rows(up_bias, expert, offs)
    # The last product is linear: weighed before it, its rows are neither kept nor read again for
    # the gradient of the weights.
    weigh_inside = norm is None and not weigh_input
    rows = weighed(activation, rows, weight, offs) if weigh_inside else activation(rows)
    rows = linear(rows.to(down.dtype), down, offs, not transposed)
    if down_bias is not None:
        bias = bias_rows(down_bias, expert, offs)
        rows = rows + (bias * weight if weigh_inside else bias)
    if norm is not None:
        if norm_weight is not None and norm_weight.dim() == 2:
            norm_weight = bias_rows(norm_weight, expert, offs)
        # The gradient of a weight for all experts sums all rows, so none may hold just anything.
        rows = normed(mask_tail(rows, offs), norm, norm_weight)
        rows = rows if weigh_input else rows * weight
    return collect_rows(rows, *grouped, picks).to(x.dtype)


def _fp8_problem(
    op: CanonicalOp[..., Any], arguments: dict[str, Any], autocast: torch.dtype | None
) -> str | None:
    """Why torch has no kernel for the eight-bit products of a call, if it has any."""
    if op is ops.fp8_linear:
        x, weight = arguments["x"], arguments["weight"]
        return linear_problem(autocast or x.dtype, weight, arguments["recipe"])
    if op is ops.experts and arguments["recipe"] is not None:
        stacks = arguments["up"], arguments["down"]
        return experts_problem(*stacks, arguments["recipe"])
    return None


_IMPLEMENTATIONS: dict[CanonicalOp[..., Any], Callable[..., Any]] = {
    ops.attention: attention,
    ops.experts: _experts,
    ops.fp8_linear: fp8_linear,
    ops.gated_mlp: ops.gated_mlp.reference,
    ops.linear_cross_entropy: linear_cross_entropy,
    ops.normed_rotary: normed_rotary,
    ops.rms_norm: _rms_norm,
    ops.rotary: ops.rotary.reference,
    ops.top_k: top_k.top_k,
}
"""Rotary and the gated MLP are their references: one is fused by Inductor, one is three GEMMs."""

_SAME_DTYPE: dict[CanonicalOp[..., Any], tuple[str, ...]] = {
    ops.attention: ("query", "key", "value", "mask", "sinks"),
    ops.experts: ("up", "down", "up_bias", "down_bias"),
    ops.linear_cross_entropy: ("x", "weight", "bias"),
}
"""The arguments that torch's kernels want in the first one's dtype; a mask may also be bool."""


@dataclass(frozen=True)
class TorchProvider:
    """Implementations on torch's public functions, for every device and dtype that torch has."""

    name: str = "torch"
    package: str | None = None

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse an op without an implementation, and arguments of mixed dtypes."""
        if op not in _IMPLEMENTATIONS:
            return Lacks(f"torch has no implementation of {op.name}")
        if op is ops.attention and call.autocast is not None:
            return None  # autocast gives every argument its dtype
        arguments = call.arguments(op)
        if op is ops.normed_rotary:
            return _without_normed_rotary(arguments)
        if op is ops.top_k and (reason := top_k.misfit(**arguments)) is not None:
            return Lacks(f"torch has none of its own: {reason}")
        if (problem := _fp8_problem(op, arguments, call.autocast)) is not None:
            return Refuse(problem)
        names = _SAME_DTYPE.get(op, ())
        tensors = {n: arguments[n] for n in names if arguments[n] is not None}
        for name, tensor in tensors.items():
            first = arguments[names[0]].dtype
            if tensor.dtype not in (first, torch.bool):
                return Refuse(f"torch wants {name} as {first}, like {names[0]}: got {tensor.dtype}")
        return None

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """The gated MLP is three GEMMs in any spelling."""
        return "the original is the same three GEMMs" if op is ops.gated_mlp else None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _IMPLEMENTATIONS[op]


def _without_normed_rotary(arguments: dict[str, Any]) -> Refuse | None:
    """Without its kernels, it is no other than the two ops that it is made of."""
    tensors = (arguments[name] for name in ("x", "weight", "cos", "sin"))
    device = arguments["x"].device.type
    reason = misfit(*tensors) if device == "cuda" else f"its kernels run on cuda: got {device}"
    return None if reason is None else Lacks(f"torch has none of its own: {reason}")

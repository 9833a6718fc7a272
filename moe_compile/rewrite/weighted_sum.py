"""The canonical form of every spelling of experts: ids and weights as [T, K], then the op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.ops.experts import experts

aten = torch.ops.aten


def weighted_sum(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    norm: Callable[..., Tensor] | None = None,
    norm_weight: Tensor | None = None,
    transposed: bool,
    weigh_input: bool,
    full: bool,
    identity: bool,
    beyond: bool = False,
) -> Tensor:
    """`ops.experts`, with what models do around it; runs on tensors and writes graphs.

    Args:
        x, up, down, activation, up_bias, down_bias, norm, norm_weight, transposed, weigh_input: see
            `ops.experts`.
        ids: [T, K], or [T] for one pick, or [B, S, K]; -1 for a pick that does not count.
        weights: the same; where `full`, those of all choices.
        full: whether the picked weights are still to be taken out.
        identity: whether ids beyond the last expert give the token itself (zero-computation
            experts, Jin et al. 2024, arXiv:2410.07348).
        beyond: whether there may be such ids; without `identity` they add nothing.
    """
    ids = _per_token(ids)
    weights = _picked(weights, ids) if full else _per_token(weights)
    own, count = ids, _value(up).shape[0]
    if identity or beyond:
        own = aten.masked_fill.Scalar(ids, aten.ge.Scalar(ids, count), -1)
    out = experts(
        x,
        own,
        weights,
        up,
        down,
        activation,
        up_bias,
        down_bias,
        norm=norm,
        norm_weight=norm_weight,
        transposed=transposed,
        weigh_input=weigh_input,
    )
    if not identity:
        return out
    passed = aten.masked_fill.Scalar(weights, aten.lt.Scalar(ids, count), 0.0)
    total = aten.to.dtype(aten.sum.dim_IntList(passed, [1], True), _value(x).dtype)
    return aten.add.Tensor(out, aten.mul.Tensor(x, total))


def _picked(weights: Any, ids: Any) -> Any:
    """[T, K] of those of all choices; for a pick that does not count, any."""
    return aten.gather.default(weights, 1, aten.clamp_min.default(ids, 0))


def _per_token(tensor: Any) -> Any:
    """As [T, K]: of one pick without its dimension, or of a batch of sequences."""
    shape = _value(tensor).shape
    if len(shape) == 1:
        return aten.unsqueeze.default(tensor, 1)
    return tensor if len(shape) == 2 else aten.reshape.default(tensor, [-1, shape[-1]])


def _value(tensor: Any) -> Tensor:
    """A tensor, or the fake one of a graph that is being written."""
    return tensor.node.meta["val"] if isinstance(tensor, fx.Proxy) else tensor

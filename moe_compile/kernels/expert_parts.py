"""What an experts block has beside its two products: routing weights, biases, the activation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.kernels.activation import activate, is_fusable
from moe_compile.kernels.expert_rows import rows_of_picks
from moe_compile.kernels.grouped_mm import grouped_mm_weight_grad


class _Arrange(torch.autograd.Function):
    """`arrange_weights`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, order: Tensor, inverse: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, offs)
        return weights.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, offs = ctx.saved_tensors
        own, is_real = rows_of_picks(grads[0], inverse, offs)
        return torch.where(is_real, own, 0), None, None, None


class _BiasRows(torch.autograd.Function):
    """`bias_rows`; its backward sums groups of rows as a product with ones.

    Eight columns of them, for alignment.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, expert: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(offs)
        return F.pad(bias, (0, 0, 0, 1)).index_select(0, expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ones = grads[0].new_ones(grads[0].shape[0], 8)
        grad = grouped_mm_weight_grad(ones, grads[0].contiguous(), *ctx.saved_tensors)
        return grad[:, 0], None, None


def arrange_weights(weights: Tensor, order: Tensor, inverse: Tensor, offs: Tensor) -> Tensor:
    """weights[T, K] to the rows, [P, 1]; the gradient of what lives elsewhere is zero."""
    arranged: Tensor = _Arrange.apply(weights.reshape(-1, 1), order, inverse, offs)
    return arranged


def experts_of_rows(ids: Tensor, num_experts: int, order: Tensor) -> Tensor:
    """The expert of each row, [P]; E for a pick that lives elsewhere."""
    return (ids.flatten() % (num_experts + 1)).index_select(0, order)


def bias_rows(bias: Tensor, expert: Tensor, offs: Tensor) -> Tensor:
    """bias[E, N] to the bias of each row's expert, [P, N]; zero for the rows of none."""
    rows: Tensor = _BiasRows.apply(bias, expert, offs)
    return rows


def bias_sums(bias: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighed sum of its experts' biases, as a product of [T, E] and bias[E, N].

    Args:
        bias: [E, N].
        ids: [T, K]; -1 for a pick that lives elsewhere.
        weights: [T, K].

    Returns:
        [T, N] in float32, if that is wider; zero for a token without a pick, whose weights and
        gradient may be anything.
    """
    dtype = torch.promote_types(torch.promote_types(bias.dtype, weights.dtype), torch.float32)
    is_own = ids[:, :, None] == torch.arange(bias.shape[0], device=ids.device)
    of_expert = torch.where(is_own, weights[:, :, None].to(dtype), 0).sum(dim=1)
    sums = of_expert @ bias.to(dtype)
    return torch.where((ids >= 0).any(dim=1, keepdim=True), sums, 0)


def kernels_of(activation: Callable[[Tensor], Tensor], rows: Tensor) -> str | None:
    """The key of the kernels for this activation of these rows; None where there are none."""
    key: str | None = getattr(activation, "key", None)
    has_kernels = rows.is_cuda and rows.dtype != torch.float64
    return key if key is not None and has_kernels and is_fusable(key, rows.shape[1]) else None


def weighed(
    activation: Callable[[Tensor], Tensor], rows: Tensor, weight: Tensor, offs: Tensor
) -> Tensor:
    """activation(rows) * weight, by kernels for this activation where there are some."""
    key = kernels_of(activation, rows)
    return activation(rows) * weight if key is None else activate(rows, weight, offs, key)

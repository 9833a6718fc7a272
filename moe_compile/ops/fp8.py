"""Numbers of eight bits: how they are scaled, and what products of them are.

A number q of a tensor stands for q * scale, where a scale belongs to a block of it and is the
largest of the block's absolute values over the largest number of the format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Recipe = Literal["current", "blockwise"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

Block = tuple[int | None, int | None]
"""The rows and columns that share a scale; None is all of them."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROW: Block = (1, None)
_SMALLEST = 1e-12
"""Of a block of zeros, the largest absolute value that is assumed."""


@dataclass(frozen=True)
class Scaling:
    """How the operands of the products of a linear layer are quantised.

    Attributes:
        rows: what shares a scale in tokens and their gradients, whose columns are multiplied.
        weight: the same in the weight, and in its transpose.
        grad: the format of gradients; everything else is e4m3.
    """

    rows: Block
    weight: Block
    grad: torch.dtype

    def multiple(self) -> int:
        """What sizes must be a multiple of."""
        return self.rows[1] or 16


SCALINGS: dict[Recipe, Scaling] = {
    "current": Scaling((None, None), (None, None), E5M2),
    "blockwise": Scaling((1, 128), (128, 128), E4M3),
}
"""Of linear layers."""

EXPERT_SCALINGS: dict[Recipe, Scaling] = {
    "current": Scaling(ROW, ROW, E4M3),
    "blockwise": SCALINGS["blockwise"],
}
"""Of experts. Scales of whole tensors would be those of rows that are no tokens."""


def quantize(x: Tensor, dtype: torch.dtype, block: Block) -> tuple[Tensor, Tensor]:
    """x [..., M, K] in `dtype`, and float32 scales of its blocks, [..., M / rows, K / columns]."""
    rows, columns = block[0] or x.shape[-2], block[1] or x.shape[-1]
    tiles = x.float().unflatten(-1, (x.shape[-1] // columns, columns))
    tiles = tiles.unflatten(-3, (x.shape[-2] // rows, rows))
    largest = torch.finfo(dtype).max
    scale = tiles.abs().amax((-3, -1), keepdim=True).clamp(min=_SMALLEST) / largest
    q = (tiles / scale).clamp(-largest, largest).to(dtype)
    return q.reshape(x.shape), scale.squeeze((-3, -1))


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """What the numbers stand for, in float32."""
    if not q.numel():
        return q.float()
    rows, columns = (q.shape[dim] // scale.shape[dim] for dim in (-2, -1))
    return q.float() * scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def rounded(x: Tensor, dtype: torch.dtype, block: Block) -> Tensor:
    """x as its quantised numbers have it, in float32."""
    return dequantize(*quantize(x, dtype, block))


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; never under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class _Product(torch.autograd.Function):
    """x [T, K] @ weight[N, K].T of rounded numbers; so are the products of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        operands = rounded(x, E4M3, scaling.rows), rounded(weight, E4M3, scaling.weight).mT
        return _in_float32(*operands).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows, dtype = ctx.scaling.rows, ctx.scaling.grad
        short = -x.shape[0] % (rows[1] or 1)
        by_token = [torch.nn.functional.pad(t, (0, 0, 0, short)).mT for t in (grads[0], x)]
        grad, inputs = (rounded(t, d, rows) for t, d in zip(by_token, (dtype, E4M3), strict=True))
        grad_x = rounded(grads[0], dtype, rows) @ rounded(weight, E4M3, ctx.scaling.weight)
        return grad_x.to(x.dtype), (grad @ inputs.mT).to(weight.dtype), None


class _ExpertProduct(_Product):
    """The same, but for the weight's gradient, which is exact."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows, dtype = ctx.scaling.rows, ctx.scaling.grad
        grad_x = rounded(grads[0], dtype, rows) @ rounded(weight.mT, E4M3, ctx.scaling.weight).mT
        return grad_x.to(x.dtype), grads[0].mT @ x, None


def product(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x [T, K] @ weight[N, K].T in x's dtype, as a linear layer computes it by the recipe."""
    return _Product.apply(x, weight, SCALINGS[recipe])


def expert_product(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """The same, as experts compute it."""
    return _ExpertProduct.apply(x, weight, EXPERT_SCALINGS[recipe])


def linear(
    multiply: Callable[[Tensor, Tensor, Recipe], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
) -> Tensor:
    """x [..., K] @ weight.T + bias, by a product of rows [T, K] and a weight of their dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    rows, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
    out = multiply(rows, weight, recipe) if rows.shape[0] else rows @ weight.mT
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)

"""Top-k of short rows as one kernel: torch selects by digits, in one, and sorts in another.

Of equal numbers the first comes first. NaN is larger than any number, as it is to torch. Compilers
see one operator, no kernel: that is what checkpointing keeps, so that nothing routes again.
"""

from typing import Any

import torch
from torch import Tensor

_MOST_COLUMNS = 1024
_MOST_PICKS = 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def misfit(x: Tensor, k: int) -> str | None:
    """Why there is no kernel for these arguments of `ops.top_k`; None if there is one."""
    if x.device.type != "cuda":
        return f"its kernel runs on cuda: got {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"its kernel takes floats of up to 32 bits: got {x.dtype}"
    if k > _MOST_PICKS or x.shape[-1] > _MOST_COLUMNS:
        return f"its kernel takes up to {_MOST_PICKS} of {_MOST_COLUMNS}: got {k} of {x.shape[-1]}"
    return None


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`ops.top_k` where it has no `misfit`."""
    values, ids = _top_k(x.reshape(-1, x.shape[-1]), k)
    return values.reshape(*x.shape[:-1], k), ids.reshape(*x.shape[:-1], k)


@torch.library.custom_op("moe_compile::top_k", mutates_args=())
def _top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Args: x: [T, E]. Returns: [T, K] twice."""
    if not x.is_cuda:
        values, ids = x.topk(k, dim=-1)
        return values, ids
    from moe_compile.kernels import top_k_kernel  # needs Triton

    return top_k_kernel.top_k(x, k)


@_top_k.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.width = inputs[0].shape[1]


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
    (ids,) = ctx.saved_tensors
    return grad.new_zeros(ids.shape[0], ctx.width).scatter(1, ids, grad), None


_top_k.register_autograd(_backward, setup_context=_save)

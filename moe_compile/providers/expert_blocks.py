"""Experts as an `expert_block`, for providers whose products gather rows as they multiply."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.expert_block import sum_of_experts
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.refuse import Refuse


def block_of(products: str) -> Callable[..., Tensor]:
    """`ops.experts` by products, for calls in which `block_problem` finds none."""
    return partial(_experts, products)


def _experts(
    products: str,
    *given: Any,
    norm: None = None,
    norm_weight: None = None,
    weigh_input: bool = False,
    recipe: None = None,
    **options: Any,
) -> Tensor:
    """What the named options ask for is refused."""
    return sum_of_experts(products, *given, **options)


def block_refusal(
    name: str,
    op: CanonicalOp[..., Any],
    call: Call,
    problem: Callable[[dict[str, Any], torch.device], str | None],
) -> Refuse | None:
    """What a provider of blocks on CUDA says of a call; `problem` is why it takes none like it."""
    if op is not ops.experts:
        return Lacks(f"{name} has no implementation of {op.name}")
    arguments = call.arguments(op)
    device = arguments["x"].device
    if device.type != "cuda":
        return Lacks(f"{name} takes tensors on cuda: got {device.type}")
    found = problem(arguments, device)
    return None if found is None else Refuse(found)


def block_problem(arguments: dict[str, Any], dtypes: Collection[torch.dtype]) -> str | None:
    """Why a block, of weights of these dtypes, does not compute a call, if it does not.

    What comes between the products and the rows of x, or the sums, cannot be left out.
    """
    if arguments["recipe"] is not None:
        return "its products here are not of FP8: these are"
    if arguments["norm"] is not None:
        return "it sums a token's rows as they are: a norm comes first here"
    if arguments["weigh_input"]:
        return "it reads the tokens as they are: they are weighed first here"
    for name in ("up", "down", "up_bias", "down_bias"):
        tensor = arguments[name]
        if tensor is not None and tensor.dtype not in dtypes:
            taken = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"it takes {taken}: {name} is {tensor.dtype}"
    return None

"""Layers whose backward computes again what their forward did not keep.

`full` keeps what a layer is given, and its routing; `selective` also what is dear to compute:
products, attention, what came back from other ranks. Routing (top-k, the order of the picks, what
dispatch received) never runs again: a token near a tie, rounded in another way, would go to other
experts in the backward than in the forward.

A start and its wait are kept together, or run together: nothing is in flight for a wait alone.

Both go by operator. A layer that runs uncompiled holds what those operators gave until the
backward, needed or not; of a compiled one the partitioner keeps what the backward reads, and also
what draws random numbers, to which torch counts every attention kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moe_compile.install.keep import keeping

_DISPATCHERS = ("all_to_all", "deep_ep", "deep_ep_elastic")

_ROUTING = (
    "aten::topk",
    "aten::sort",
    "aten::argsort",
    "aten::argmax",
    "aten::max.dim",
    "aten::multinomial",
    "moe_compile::group_picks",
    "moe_compile::top_k",
    *(
        f"moe_compile::{name}_{op}"
        for name in _DISPATCHERS
        for op in ("dispatch", "start_dispatch", "wait_dispatch")
    ),
)
"""Operators that decide where tokens go; with an overload's name, that one alone."""

_DEAR = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "flex_attention",
    "moe_compile::grouped_mm",
    "moe_compile::fp8_mm",
    "moe_compile::fp8_grouped_mm",
    "moe_compile::te_fp8_linear",
    "moe_compile::gathered_product",
    "moe_compile::quack_product",
    *(
        f"moe_compile::{name}_{op}"
        for name in _DISPATCHERS
        for op in ("combine", "start_combine", "wait_combine")
    ),
)

KEPT: dict[str, frozenset[str]] = {
    "full": frozenset(_ROUTING),
    "selective": frozenset((*_ROUTING, *_DEAR)),
}
"""What the forward keeps, by `OptimizeConfig.activation_checkpointing`."""


def recomputing(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`function`, a layer's forward, for whose backward only `KEPT[mode]` is kept.

    A call with a cache keeps everything: the second time, the cache would hold this call too.
    """
    kept = KEPT[mode]
    eager = functools.partial(keeping, functools.partial(_keeps, kept))
    compiled = functools.partial(
        create_selective_checkpoint_contexts, functools.partial(policy, kept)
    )

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not _is_plain((args, kwargs)):
            return function(self, *args, **kwargs)
        contexts = compiled if torch.compiler.is_compiling() else eager
        return checkpoint(function, self, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return functools.update_wrapper(forward, function)


@functools.cache
def _names(op: Any) -> frozenset[str]:
    """What an operator is called in `KEPT`: with and without its overload."""
    name: str = op.name()
    return frozenset((name, name.partition(".")[0]))


def _keeps(kept: frozenset[str], op: Any) -> bool:
    return not kept.isdisjoint(_names(op))


def policy(
    kept: frozenset[str], _: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """What becomes of an operator's result in a compiled layer; `torch.utils.checkpoint` asks."""
    # Torch 2.13 puts the state of what draws where it looks for a DTensor's mesh, and fails.
    draws = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
    if draws or _keeps(kept, op):
        return CheckpointPolicy.MUST_SAVE
    if op is torch.ops.aten._assert_scalar.default:
        # Asked to check a size again, torch 2.11 keeps the comparison, which Inductor cannot pass.
        return CheckpointPolicy.PREFER_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_plain(value: Any) -> bool:
    """Whether an argument holds tensors and plain values only: nothing that keeps state."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))

"""The head and the loss of a language model, from hidden states to a number."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.canonical import canonical, upcast


@canonical
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    ignore_index: int = -100,
    mean: bool = True,
) -> Tensor:
    """The cross-entropy of the logits `transform(x @ weight.T + bias)`, in float32 at least.

    Args:
        x: [T, H], hidden states.
        weight: [V, H], of the head.
        labels: [T], integers in 0..V-1, or `ignore_index`.
        bias: [V].
        transform: maps logits to logits, each element by itself: casts, scales, a soft cap.
        ignore_index: the label of a row that does not count.
        mean: over the rows that count, which must be at least one; else their sum.

    Returns:
        a scalar.

    Source: `ForCausalLMLoss` of transformers.
    """
    logits = F.linear(x, weight, bias)
    logits = logits if transform is None else transform(logits)
    reduction = "mean" if mean else "sum"
    return F.cross_entropy(upcast(logits), labels, ignore_index=ignore_index, reduction=reduction)

"""The first half of `combine`: results set off, and something else may be computed meanwhile."""

import torch
from torch import Tensor

from moe_compile.ops.canonical import canonical
from moe_compile.ops.combine import combine


@canonical
def start_combine(
    y: Tensor, handle: list[Tensor], num_tokens: int, group: str, after: Tensor | None = None
) -> list[Tensor]:
    """Begin to return each row to the rank it came from.

    The reference is the meaning for a group of one rank, where every row is at home.

    Args:
        y, handle, num_tokens, group: As in `combine`; the handle is of `wait_dispatch`.
        after: As in `start_dispatch`.

    Returns:
        first what this was done by; the rest only `wait_combine` reads.
    """
    return [torch.zeros(1, device=y.device), combine(y, handle, num_tokens, group)]

"""The largest numbers of each row: with which a router picks its experts."""

from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the largest first.

    Args:
        x: [..., E].
        k: Up to E.

    Returns:
        values [..., K] and where they are, [..., K] int64; of equal ones any come first.
    """
    values, ids = x.topk(k, dim=-1)
    return values, ids

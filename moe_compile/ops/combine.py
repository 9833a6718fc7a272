"""The second op boundary of expert parallelism: results travel back to their tokens."""

from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def combine(y: Tensor, source: Tensor, splits: Tensor, num_tokens: int, group: str) -> Tensor:
    """Return each row to the rank it came from and sum, unweighted, the rows of each token.

    The reference is the meaning for a group of ONE rank, where every row is here already. No
    provider for more ranks exists in this release.

    Args:
        y: [U, H], a result for each row that `dispatch` received.
        source: [V], from `dispatch`.
        splits: [2, ranks], from `dispatch`.
        num_tokens: T, this rank's tokens.
        group: Name of the process group.

    Returns:
        [T, H].
    """
    return y.new_zeros(num_tokens, y.shape[1]).index_add(0, source, y)

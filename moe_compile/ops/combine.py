"""The second op boundary of expert parallelism: results travel back to their tokens."""

from torch import Tensor

from moe_compile.ops.canonical import canonical


@canonical
def combine(y: Tensor, handle: list[Tensor], num_tokens: int, group: str) -> Tensor:
    """Return each row to the rank it came from and sum, unweighted, the rows of each token.

    The reference is the meaning for a group of one rank, where every row is at home.

    Args:
        y: [U, H], a result for each row that `dispatch` received.
        handle: From `dispatch`.
        num_tokens: T, this rank's tokens.
        group: Name of the process group, of which all ranks make this call.

    Returns:
        [T, H]; zero for a token without an expert.
    """
    return y.new_zeros(num_tokens, y.shape[1]).index_add(0, handle[0], y)

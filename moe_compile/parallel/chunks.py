"""A rank's tokens in parts that travel one after the other."""

from torch import Tensor


def token_chunks(t: Tensor, count: int) -> list[Tensor]:
    """`count` parts of t [T, ...], in order, of which none is longer than another by more than 1.

    Some are empty where T is smaller than `count`: every rank has as many.
    """
    total = t.shape[0]
    sizes = [total * (i + 1) // count - total * i // count for i in range(count)]
    return list(t.split(sizes))


def num_tokens(chunk: Tensor) -> int:
    """How many tokens are in a part."""
    return chunk.shape[0]

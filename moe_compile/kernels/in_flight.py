"""What was sent and has not been waited for, by the small tensor that stands for it in a graph.

An asynchronous collective writes into tensors that must not be read, and reads some that must not
be let go of, until it is waited for. None of them is the output of an operator in between: an
output may be copied, kept for a backward or reused, and the operator that waits could not return
it, since it must not return what it was given. What is sent is a copy for the same reason. The op
that starts returns a *stand-in*, one row of the same width and dtype, and puts the rest here; the
op that waits takes it by the stand-in.

In the backward a stand-in's gradient is the stand-in of what travels the other way. So it has one
user, and autograd hands it on as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Land = Callable[[], tuple[Tensor, ...]]
"""Waits for collectives and gives what they wrote; it holds on to all that they read and write."""

_FLIGHTS: dict[int, tuple[Tensor, Land]] = {}


def private(t: Tensor) -> Tensor:
    """A contiguous copy to send.

    A compiler may put something else where an op's arguments were, as soon as the op has returned.
    """
    return t.clone(memory_format=torch.contiguous_format)


def stand_in(like: Tensor) -> Tensor:
    """[1, W] for rows [N, W], which nobody reads."""
    return like.new_empty(1, like.shape[1])


def put(key: Tensor, land: Land) -> None:
    """Notes what a stand-in stands for; it is kept too, so that its address is its own."""
    assert key.data_ptr() not in _FLIGHTS
    _FLIGHTS[key.data_ptr()] = key, land


def take(key: Tensor) -> tuple[Tensor, ...]:
    """Waits for what a stand-in stands for."""
    assert key.data_ptr() in _FLIGHTS, "a flight is waited for once, by its own stand-in"
    return _FLIGHTS.pop(key.data_ptr())[1]()


def count() -> int:
    """How many have not been waited for."""
    return len(_FLIGHTS)

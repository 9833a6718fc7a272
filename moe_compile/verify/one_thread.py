"""Keeps tiny tensors on one thread."""

import contextlib
from collections.abc import Generator

import torch


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """In it, operators on the CPU run on the calling thread.

    A proof runs thousands of them on a few rows each: where other programs hold the cores, waiting
    for a second thread takes a hundred times what it computes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

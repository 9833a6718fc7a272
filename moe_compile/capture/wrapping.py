"""Traces without a record of the arithmetic that torch does on sizes for itself.

Every value of a trace is wrapped as a `FunctionalTensor`, which computes the bytes and the
contiguity of its symbolic sizes. The tracer would note each of these sums and products as a node
that nobody uses, and whether the value is contiguous in its `tensor_meta`, which nobody reads: a
third of the time of a trace.
"""

import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor


@contextlib.contextmanager
def untraced_wrapping() -> Generator[None]:
    """In it, arithmetic on sizes is traced where code does it, not where torch wraps a tensor."""
    wrap: Any = FunctionalTensor.__new__
    tracer: Any = proxy_tensor.get_proxy_mode
    wrapping = False

    def wrap_untraced(*args: Any) -> FunctionalTensor:
        nonlocal wrapping
        wrapping = True
        try:
            return wrap(*args)
        finally:
            wrapping = False

    def tracer_of_code() -> Any:
        return None if wrapping else tracer()

    with (
        mock.patch.object(FunctionalTensor, "__new__", wrap_untraced),
        mock.patch.object(proxy_tensor, "_extract_tensor_metadata", return_value=None),
        mock.patch.object(proxy_tensor, "get_proxy_mode", tracer_of_code),
    ):
        yield

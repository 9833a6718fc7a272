"""Traces without a record of the arithmetic that torch does on sizes for itself.

Every value of a trace is wrapped as a `FunctionalTensor`, and made known to the tracer: both
compute the bytes and the elements of its symbolic sizes. The tracer would note each of these sums
and products as a node that nobody uses, and whether the value is contiguous in its `tensor_meta`,
which nobody reads: a third of the time of a trace.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor


@contextlib.contextmanager
def untraced_wrapping() -> Generator[None]:
    """In it, arithmetic on sizes is traced where code does it, not where torch wraps a tensor."""
    wrap: Any = FunctionalTensor.__new__
    track: Any = proxy_tensor.track_tensor
    tracer: Any = proxy_tensor.get_proxy_mode
    wrapping = False

    def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal wrapping
            before, wrapping = wrapping, True
            try:
                return function(*args, **kwargs)
            finally:
                wrapping = before

        return run

    def tracer_of_code() -> Any:
        return None if wrapping else tracer()

    with (
        mock.patch.object(FunctionalTensor, "__new__", untraced(wrap)),
        mock.patch.object(proxy_tensor, "track_tensor", untraced(track)),
        mock.patch.object(proxy_tensor, "_extract_tensor_metadata", return_value=None),
        mock.patch.object(proxy_tensor, "get_proxy_mode", tracer_of_code),
    ):
        yield

"""Traces without a record of the arithmetic that torch does on sizes for itself.

Every operator of a trace is made functional, and every value of it is wrapped as a
`FunctionalTensor`: both compute sizes, strides and the contiguity of symbolic sizes. The tracer
would note each of these sums and products as a node that nobody uses: more than half of all nodes.
Here it makes such a node when it is used. Nor is a value's `tensor_meta` noted, which nobody reads.
"""

import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental import proxy_tensor

_OPTIONS = 13
"""How many a `FunctionalTensor` is made with; one more is the size of its storage."""

_BYTES = 1 << 50
"""Of a wrapper, which has none: torch takes a millisecond to say how many symbolic sizes need."""


@contextlib.contextmanager
def untraced_wrapping() -> Generator[None]:
    """In it, arithmetic on sizes is traced where code does it, not where torch does."""
    tracer: Any = proxy_tensor.get_proxy_mode
    wrapping = False

    def wrap_untraced(*args: Any) -> FunctionalTensor:
        nonlocal wrapping
        wrapping = True
        try:
            return wrap(*args)
        finally:
            wrapping = False

    def dispatch_lazily(*args: Any, **kwargs: Any) -> Any:
        mode = tracer()
        lazily = contextlib.nullcontext() if mode is None else thunks(mode.tracer)
        with lazily:
            return dispatch(*args, **kwargs)

    def tracer_of_code() -> Any:
        return None if wrapping else tracer()

    def make_wrapper(cls: type, *options: Any) -> Any:
        known = cls is FunctionalTensor and len(options) == _OPTIONS
        return make(cls, *options, _BYTES) if known else make(cls, *options)

    make: Any = torch.Tensor._make_wrapper_subclass
    wrap: Any = FunctionalTensor.__new__
    dispatch: Any = FunctionalTensorMode.__torch_dispatch__
    thunks: Any = getattr(proxy_tensor, "_enable_thunkify", contextlib.nullcontext)
    with (
        mock.patch.object(FunctionalTensor, "__new__", wrap_untraced),
        mock.patch.object(FunctionalTensorMode, "__torch_dispatch__", dispatch_lazily),
        mock.patch.object(torch.Tensor, "_make_wrapper_subclass", make_wrapper),
        _patched(proxy_tensor, "_extract_tensor_metadata", lambda _: None),
        mock.patch.object(proxy_tensor, "get_proxy_mode", tracer_of_code),
        # Whenever a mode changes torch clears what operators remember for it: they never do.
        _patched(torch._ops, "get_cached_ops", tuple),
    ):
        yield


def _patched(owner: Any, name: str, value: Any) -> contextlib.AbstractContextManager[Any]:
    """Nothing is replaced that another torch lacks: a trace is the same then, and takes longer."""
    has_it = hasattr(owner, name)
    return mock.patch.object(owner, name, value) if has_it else contextlib.nullcontext()

"""Runs narrower code in float64."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = {torch.float16, torch.bfloat16, torch.float32}


class InFloat64(TorchDispatchMode):
    """Turns casts to narrower floats into casts to float64, also those of new tensors."""

    def __enter__(self) -> Any:
        self.default = default_float64()
        self.default.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.default.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **in_float64(kwargs))


@contextmanager
def default_float64() -> Generator[None]:
    """In it, new floats are float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def in_float64(options: dict[str, Any] | None) -> dict[str, Any]:
    """An operator's keyword arguments, with float64 in the place of a narrower float."""
    options = options or {}
    return options | {"dtype": wide(options["dtype"])} if options.get("dtype") else options


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float64 in the place of a narrower float."""
    return torch.float64 if dtype in _NARROW else dtype

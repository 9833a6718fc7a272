"""Runs narrower code in float64."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = {torch.float16, torch.bfloat16, torch.float32}


class InFloat64(TorchDispatchMode):
    """Turns casts to narrower floats into casts to float64, also those of new tensors."""

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.default)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **in_float64(kwargs))


def in_float64(options: dict[str, Any] | None) -> dict[str, Any]:
    """An operator's keyword arguments, with float64 in the place of a narrower float."""
    options = options or {}
    return options | {"dtype": torch.float64} if options.get("dtype") in _NARROW else options

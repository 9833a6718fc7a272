"""`module.to(dtype)` inside of a forward: nothing happens where the module has that dtype already.

On fake parameters torch swaps tensors even then, which fails for those that something refers to.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


def free_conversions() -> Any:
    """In it, a conversion of a module that would change no tensor of it does nothing."""
    original: Any = nn.Module._apply

    def apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = [*module.parameters(recurse), *module.buffers(recurse)]
        if all(_keeps(convert, *kind) for kind in {(t.dtype, t.device) for t in held}):
            return module
        return original(module, convert, recurse)

    return mock.patch.object(nn.Module, "_apply", apply)


def _keeps(convert: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    with _disable_current_modes():
        converted = convert(torch.empty(0, dtype=dtype, device=device))
    return (converted.dtype, converted.device) == (dtype, device)

"""`F.grouped_mm` for fake tensors of every dtype: torch's own fake takes bfloat16 only."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_compile.kernels.grouped_mm import grouped_mm

_GROUPED_MM: Any = getattr(torch, "_grouped_mm")  # noqa: B009  (what `F.grouped_mm` calls)


class AnyDtypeGroupedMM(TorchFunctionMode):
    """Spells `F.grouped_mm` as our op, whose fake takes every dtype (torch's takes bf16 only)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _GROUPED_MM and _is_plain_grouped(*args, **kwargs):
            x, weight, offs = _grouped_arguments(*args, **kwargs)
            return grouped_mm(x, weight, offs)
        return func(*args, **kwargs)


def _is_plain_grouped(x: Tensor, weight: Tensor, offs: Any = None, **options: Any) -> bool:
    unused = all(value is None for value in options.values())
    return x.dim() == 2 and weight.dim() == 3 and offs is not None and unused


def _grouped_arguments(
    x: Tensor, weight: Tensor, offs: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x, weight, offs

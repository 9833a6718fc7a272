"""The forms of views, from sizes and strides alone: torch's kernels are slow on symbolic sizes.

Only the dimension that a view cuts into need be known; a rule that is not sure gives None.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moe_compile.capture.tensor_form import Form, Forms, Size

aten = torch.ops.aten


@dataclass(frozen=True)
class _Layout:
    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size

    def without(self, dim: int) -> "_Layout":
        """Where the elements with index 0 of a dimension lie."""
        rest = [i for i in range(len(self.sizes)) if i != dim]
        return self.in_order(rest)

    def in_order(self, dims: Sequence[int]) -> "_Layout":
        """With the dimensions in another order."""
        sizes, strides = tuple(self.sizes[i] for i in dims), tuple(self.strides[i] for i in dims)
        return replace(self, sizes=sizes, strides=strides)

    def moved(self, stride: Size, steps: int) -> "_Layout":
        """What begins some steps further on."""
        return replace(self, offset=self.offset + stride * steps if steps else self.offset)


def views(forms: Forms, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The form of a view, or a list of those of several; None where no rule is sure of it."""
    rule = _RULES.get(func)
    if rule is None or kwargs:
        return None
    form = forms.of(args[0])
    found = rule(_Layout(form.sizes, form.strides, form.offset), *args[1:])
    if isinstance(found, list):
        layouts: list[_Layout | None] = found
        return None if None in layouts else [_formed(forms, form, part) for part in found]
    return None if found is None else _formed(forms, form, found)


def _formed(forms: Forms, source: Form, layout: _Layout) -> Form:
    place = layout.sizes, layout.strides, source.dtype, source.device
    return forms.find(*place, offset=layout.offset)


def _select(source: _Layout, dim: int, index: Any) -> _Layout | None:
    dim %= len(source.sizes)
    size = source.sizes[dim]
    if not _are_known(size, index) or not -size <= index < size:
        return None
    return source.without(dim).moved(source.strides[dim], index % size)


def _unbind(source: _Layout, dim: int = 0) -> list[_Layout | None] | None:
    size = source.sizes[dim]
    return [_select(source, dim, i) for i in range(size)] if isinstance(size, int) else None


def _slice(
    source: _Layout, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> _Layout | None:
    dim %= len(source.sizes)
    size = source.sizes[dim]
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    if not _are_known(size, start, end, step):
        return None
    picked, stride = range(size)[start:end:step], source.strides[dim]
    sizes = (*source.sizes[:dim], len(picked), *source.sizes[dim + 1 :])
    strides = (*source.strides[:dim], stride * step, *source.strides[dim + 1 :])
    first = min(max(start + size if start < 0 else start, 0), size)
    return replace(source, sizes=sizes, strides=strides).moved(stride, first)


def _split(source: _Layout, widths: Any, dim: int = 0) -> list[_Layout | None] | None:
    size = source.sizes[dim]
    if not _are_known(size, *pytree.tree_leaves(widths)) or not size:
        return None
    if isinstance(widths, int):
        return [_slice(source, dim, start, start + widths) for start in range(0, size, widths)]
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    if ends[-1] != size or min(widths) < 0:
        return None
    return [_slice(source, dim, end - n, end) for end, n in zip(ends, widths, strict=True)]


def _squeeze(source: _Layout, dim: int) -> _Layout | None:
    if not source.sizes or not isinstance(source.sizes[dim], int):
        return None
    return source.without(dim % len(source.sizes)) if source.sizes[dim] == 1 else source


def _unsqueeze(source: _Layout, dim: int) -> _Layout:
    dim %= len(source.sizes) + 1
    inside = dim < len(source.sizes)
    stride = source.sizes[dim] * source.strides[dim] if inside else 1
    sizes = (*source.sizes[:dim], 1, *source.sizes[dim:])
    return replace(
        source, sizes=sizes, strides=(*source.strides[:dim], stride, *source.strides[dim:])
    )


def _transpose(source: _Layout, one: int, other: int) -> _Layout | None:
    order = list(range(len(source.sizes)))
    if not order:
        return None
    order[one], order[other] = order[other], order[one]
    return source.in_order(order)


def _t(source: _Layout) -> _Layout | None:
    return _transpose(source, 0, 1) if len(source.sizes) == 2 else None


def _permute(source: _Layout, dims: Sequence[int]) -> _Layout | None:
    order = [dim % len(source.sizes) for dim in dims]
    return source.in_order(order) if sorted(order) == [*range(len(source.sizes))] else None


def _are_known(*numbers: Any) -> bool:
    return all(isinstance(number, int) for number in numbers)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.dim: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
}

VIEWS = frozenset(_RULES)
"""The views that there are rules for; none is made of other operators."""

"""The form of what the commonest operators give, from the forms of their arguments.

Torch decomposes many of them in Python, which takes up to 30 ms on symbolic sizes. A rule that is
not sure leaves the operator to torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch.utils import _pytree as pytree

from moe_compile.capture.tensor_form import Form, Forms, Size, expression
from moe_compile.capture.view_forms import views

aten = torch.ops.aten

_LIKE = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.empty_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten._to_copy.default,
}
"""What they give has the sizes of their one tensor."""

_UNSURE = (torch.SymInt, torch.SymFloat, torch.SymBool, torch.device)
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def form_of_result(forms: Forms, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The form of an operator's result, or a list of forms; None where no rule is sure of it."""
    rule = _rule(func)
    return (rule or views)(forms, func, args, kwargs)


def _rule(func: Any) -> Callable[..., Form | None] | None:
    if func in _VIEWS:
        return _view
    if func is aten.new_empty_strided.default:
        return _empty
    if func in _LIKE or torch.Tag.pointwise in func.tags:
        return _pointwise
    return None


def _pointwise(forms: Forms, func: Any, args: Sequence[Any], kwargs: Any) -> Form | None:
    """Of contiguous tensors, of which one has all elements of the result, it is laid out as that.

    Which dtype it has torch says of tensors of one element.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    operands = {i: forms.of(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    known = list(operands.values())
    sizes = _broadcast([form.sizes for form in known])
    full = next((form for form in known if _same(form.sizes, sizes)), None)
    alike = all(form.is_contiguous and form.device == known[0].device for form in known)
    if full is None or not alike:
        return None
    for i, form in operands.items():
        leaves[i] = torch.ones([1] * len(form.sizes), dtype=form.dtype)
    if any(isinstance(leaf, _UNSURE) or leaf is torch.channels_last for leaf in leaves):
        return None
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        with no_python_dispatcher():
            small = func(*args, **kwargs)
    except RuntimeError:  # torch's own run says how it fails
        return None
    if not isinstance(small, Tensor) or small.dim() != len(full.sizes):
        return None
    return forms.find(full.sizes, full.strides, small.dtype, full.device)


def _view(forms: Forms, func: Any, args: Sequence[Any], kwargs: Any) -> Form | None:
    """Of a contiguous tensor: contiguous, of the sizes that were asked for."""
    source, asked = forms.of(args[0]), args[1]
    if kwargs or not source.is_contiguous:
        return None
    count = _product(source.sizes)
    given = _product(size for size in asked if not _is_rest(size))
    if expression(given) == 0:
        return None
    sizes = [count // given if _is_rest(size) else size for size in asked]
    if expression(_product(sizes)) != expression(count):
        return None
    strides = [_product(sizes[i + 1 :]) for i in range(len(sizes))]
    return forms.find(sizes, strides, source.dtype, source.device)


def _empty(forms: Forms, func: Any, args: Sequence[Any], kwargs: Any) -> Form | None:
    """Of sizes and strides that are given."""
    like, sizes, strides = forms.of(args[0]), args[1], args[2]
    options = {name: option for name, option in kwargs.items() if option}
    dtype, device = options.pop("dtype", like.dtype), options.pop("device", like.device)
    return None if options else forms.find(sizes, strides, dtype, device)


def _is_rest(size: Size) -> bool:
    return isinstance(size, int) and size == -1


def _product(sizes: Any) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _broadcast(shapes: list[tuple[Size, ...]]) -> tuple[Size, ...] | None:
    """The sizes of the result; None where two of a dimension are not surely equal."""
    rank = max(map(len, shapes), default=0)
    padded = [(*[1] * (rank - len(shape)), *shape) for shape in shapes]
    sizes: list[Size] = []
    for column in zip(*padded, strict=True):
        others = {expression(size): size for size in column if expression(size) != 1}
        if len(others) > 1:
            return None
        sizes.append(next(iter(others.values()), 1))
    return tuple(sizes)


def _same(left: tuple[Size, ...], right: tuple[Size, ...] | None) -> bool:
    return right is not None and [*map(expression, left)] == [*map(expression, right)]

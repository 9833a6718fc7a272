"""What a fake tensor is, but for its identity: its form.

Torch takes nearly a millisecond to make a tensor with symbolic sizes, and a twentieth of that to
make another of the same form.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

Size = int | torch.SymInt

PLAIN = (bool, int, float, complex, str, type(None))
DESCRIBES = (torch.dtype, torch.device, torch.layout, torch.memory_format)

_FORM = "_moe_compile_form"


class Formless(Exception):
    """A value that no form says everything of."""


@dataclass(eq=False)
class Form:
    """A fake tensor's sizes, strides, offset, dtype and device. Equal forms are one object.

    Attributes:
        prototype: a tensor of the meta device; its storage is that of every tensor.
        symbols: those of its sizes that depend on data.
        is_contiguous: whether it surely is; where it begins does not matter.
        kind: what `Renaming` finds that others share but for the names of such sizes.
    """

    prototype: Tensor
    device: torch.device
    symbols: frozenset[sympy.Symbol] = field(init=False)
    is_contiguous: bool = field(init=False)
    kind: Any = field(init=False, default=None, repr=False)
    _at_start: "Form | None" = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.symbols = frozenset(free_unbacked_symbols([*self.sizes, *self.strides]))
        self.is_contiguous = _are_contiguous(self.sizes, self.strides)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Numbers, and symbolic sizes."""
        return tuple(self.prototype.shape)

    @property
    def strides(self) -> tuple[Size, ...]:
        """Numbers, and products of symbolic sizes."""
        return self.prototype.stride()

    @property
    def offset(self) -> Size:
        """Where it begins in its storage."""
        return self.prototype.storage_offset()

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.prototype.dtype

    def __deepcopy__(self, _: Any) -> "Form":
        return self


class Forms:
    """Every form that fake tensors of a mode have had."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.known: dict[Any, Form] = {}

    def of(self, tensor: Any) -> Form:
        """The form of a fake tensor.

        Raises:
            Formless: it is of another mode, holds known numbers, or is not plain and dense.
        """
        form = getattr(tensor, _FORM, None)
        if form is None:
            form = self._of(tensor)
            setattr(tensor, _FORM, form)
        return form

    def _of(self, tensor: Any) -> Form:
        if not isinstance(tensor, FakeTensor) or tensor.fake_mode is not self.mode:
            raise Formless
        odd = tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg()
        if odd or tensor.constant is not None:
            raise Formless
        sizes, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self.find(sizes, strides, tensor.dtype, tensor.fake_device, offset=offset)

    def at_start(self, form: Form) -> Form:
        """The form of the same tensors where they begin where their storage does."""
        if form._at_start is None:
            here = expression(form.offset) == 0
            place = form.sizes, form.strides, form.dtype, form.device
            form._at_start = form if here else self.find(*place)
        return form._at_start

    def find(
        self,
        sizes: Any,
        strides: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        offset: Size = 0,
    ) -> Form:
        """The form of tensors with these sizes and strides."""
        key = _key(sizes, strides, offset, dtype, device)
        if key not in self.known:
            with torch._C._DisableTorchDispatch():
                prototype = _storage(dtype).as_strided(sizes, strides, offset)
            self.known[key] = Form(prototype, device)
        return self.known[key]

    def new(self, form: Form) -> FakeTensor:
        """A tensor of the form."""
        tensor = FakeTensor(self.mode, form.prototype, form.device)
        setattr(tensor, _FORM, form)
        return tensor


@functools.cache
def _storage(dtype: torch.dtype) -> Tensor:
    """Of which every prototype is a view: how long its own would be takes milliseconds to say."""
    return torch.empty(1 << 50, dtype=dtype, device="meta")


def key_of(forms: Forms, argument: Any, is_viewed: bool) -> Hashable:
    """What another argument must share to be as good.

    Where a tensor begins in its storage only its views tell.

    Raises:
        Formless: nothing says when another would be.
    """
    if isinstance(argument, Tensor):
        form = forms.of(argument)
        return form if is_viewed else forms.at_start(form)
    if isinstance(argument, (*PLAIN, *DESCRIBES)):
        return type(argument), argument
    if isinstance(argument, torch.SymInt):
        return expression(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument), *(key_of(forms, part, is_viewed) for part in argument)
    if isinstance(argument, dict):
        return *argument, *(key_of(forms, part, is_viewed) for part in argument.values())
    raise Formless


def forget(tensor: Any) -> None:
    """Its form may have changed."""
    if isinstance(tensor, FakeTensor):
        vars(tensor).pop(_FORM, None)


def expression(size: Any) -> Any:
    """A number, or what a symbolic size is made of: comparable and hashable."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _key(sizes: Any, strides: Any, offset: Size, *rest: Any) -> Hashable:
    return (*map(expression, sizes), None, *map(expression, strides), expression(offset), *rest)


def _are_contiguous(sizes: tuple[Size, ...], strides: tuple[Size, ...]) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if expression(size) != 1 and _unbounded(expression(stride)) != expected:
            return False
        expected = expected * expression(size)
    return True


def _unbounded(stride: Any) -> Any:
    """Without the `Max(1, size)` that torch's Python kernels make of a size."""
    if isinstance(stride, int):
        return stride
    return stride.replace(sympy.Max, lambda *parts: next(p for p in parts if p != 1))

"""Call forms: which calls an installed function was captured for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moe_compile.capture.boundary import ModuleCall
from moe_compile.capture.trace import Mode
from moe_compile.capture.untouched import Untouched, UntouchedStore


@dataclass(frozen=True)
class TensorForm:
    """A tensor argument: dtype, device type and the sizes that are fixed (None where any)."""

    dtype: torch.dtype
    device: str
    sizes: tuple[int | None, ...]

    def accepts(self, value: Any) -> bool:
        """Whether a call's argument fits."""
        return (
            isinstance(value, Tensor)
            and value.dtype == self.dtype
            and value.device.type == self.device
            and value.dim() == len(self.sizes)
            and all(
                want is None or want == got
                for want, got in zip(self.sizes, value.shape, strict=True)
            )
        )


@dataclass(frozen=True)
class ValueForm:
    """A plain argument that the captured code looked at: it must be the same value."""

    value: Any

    def accepts(self, value: Any) -> bool:
        """Whether a call's argument fits."""
        if self.value is None or isinstance(self.value, bool):
            return value is self.value
        return type(value) is type(self.value) and bool(value == self.value)


@dataclass(frozen=True)
class StoreForm:
    """An object that the captured code only handed on: any of the same type, or a stand-in."""

    kind: type

    def accepts(self, value: Any) -> bool:
        """Whether a call's argument fits."""
        return isinstance(value, UntouchedStore) or type(value) is self.kind


@dataclass(frozen=True)
class CallForm:
    """The form of a module call: mode, arguments by position and name, and what does not matter.

    Attributes:
        args, kwargs: nested tuples, lists and dicts of `TensorForm` and `ValueForm`.
        ignored: keywords that may be absent, present, and of any value.
        twins: pairs of tensor arguments, by their order, that were one tensor.
        device: the device type of the tensor arguments.
    """

    mode: Mode
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ignored: frozenset[str]
    twins: tuple[tuple[int, int], ...]
    device: str

    @classmethod
    def of(cls, call: ModuleCall, tensors: list[Any], mode: Mode) -> "CallForm":
        """The form of a captured call, with its tensor inputs' graph nodes."""
        leaves: list[Any] = [_value_form(leaf) for leaf in call.inputs]
        for position, node in zip(call.tensor_inputs, tensors, strict=True):
            leaves[position] = _tensor_form(node.meta["val"])
        args, kwargs = pytree.tree_unflatten(leaves, call.input_spec)
        ignored = {name for name, value in kwargs.items() if isinstance(value, Untouched)}
        kept = {name: value for name, value in kwargs.items() if name not in ignored}
        first = {node: i for i, node in reversed(list(enumerate(tensors)))}
        twins = tuple((first[node], i) for i, node in enumerate(tensors) if first[node] != i)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, TensorForm))
        return cls(mode, tuple(args), kept, frozenset(ignored), twins, device)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """The tensor arguments of a call, in the captured order; None if the form differs."""
        given = {n: v for n, v in kwargs.items() if n not in self.ignored}
        if given.keys() != self.kwargs.keys():
            return None
        found = _tensors((self.args, self.kwargs), (args, given))
        if found is None or any(found[a] is not found[b] for a, b in self.twins):
            return None
        return found


def _value_form(value: Any) -> Any:
    if not isinstance(value, Untouched):
        return ValueForm(value)
    is_store = issubclass(type(value), UntouchedStore)
    return StoreForm(object.__getattribute__(value, "kind")) if is_store else value


def _tensor_form(value: Tensor) -> TensorForm:
    shape: list[Any] = list(value.shape)
    sizes = tuple(size if isinstance(size, int) else None for size in shape)
    return TensorForm(value.dtype, value.device.type, sizes)


def _tensors(form: Any, value: Any) -> tuple[Tensor, ...] | None:
    """The tensors of an argument in order, or None where it does not have the form."""
    if isinstance(form, Untouched):
        return ()
    if isinstance(form, TensorForm):
        return (value,) if form.accepts(value) else None
    if isinstance(form, (ValueForm, StoreForm)):
        return () if form.accepts(value) else None
    if type(value) is not type(form) or len(value) != len(form):
        return None
    found: tuple[Tensor, ...] = ()
    for key in form if isinstance(form, dict) else range(len(form)):
        if isinstance(form, dict) and key not in value:
            return None
        part = _tensors(form[key], value[key])
        if part is None:
            return None
        found += part
    return found

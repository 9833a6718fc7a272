"""Proof that a value does not matter: trace with a stand-in that cannot be looked at.

Models hand flags and loss arguments (`use_cache`, `num_items_in_batch`) through every layer. A
graph holds for any value of an argument that its code never looked at, and for calls without it;
so it does for any value of an attribute, such as the number of a layer, but of one kind alone:
nothing sees code that asks whether the stand-in is None, or True, or calls `type` on it.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

KINDS = (int, float, str)
"""What stand-ins of attributes may stand for: values of these types, not of subclasses."""


class Touched(Exception):
    """The traced code looked at a stand-in; its value is part of the call form."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TouchedAttribute(Exception):
    """The traced code looked at a module's attribute: at its (module's path, name)."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(path, name)
        self.attribute = path, name


class Untouched:
    """Stands for a plain value. Passing it on is fine; looking at it raises `Touched`."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_error", Touched(name))

    def _touch(self, *_: Any) -> NoReturn:
        raise object.__getattribute__(self, "_error")

    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = _touch
    __call__ = __getitem__ = __setitem__ = __contains__ = __getattr__ = __setattr__ = _touch
    __lt__ = __le__ = __gt__ = __ge__ = _touch
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _touch
    __truediv__ = __rtruediv__ = __neg__ = __str__ = __format__ = _touch

    def __eq__(self, other: object) -> bool:
        self._touch()

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class OfKind:
    """What traced code read of an attribute whose value did not matter: the value's type."""

    kind: type


class UntouchedAttribute(Untouched):
    """Stands for an attribute of the module at `path`: looking at it is a `TouchedAttribute`."""

    __hash__ = Untouched._touch  # type: ignore[assignment]
    __class__ = property(Untouched._touch)  # type: ignore[assignment]

    def __init__(self, path: str, name: str, kind: type) -> None:
        object.__setattr__(self, "_error", TouchedAttribute(path, name))
        object.__setattr__(self, "kind", OfKind(kind))
        object.__setattr__(self, "where", f"{path}.{name}" if path else name)


class UntouchedStore(Untouched):
    """Stands for an object in which tensors are kept; `kind` is its type.

    Passing it on is fine; reading tensors from it, or leaving them there, is nothing for a graph.
    """

    def __init__(self, kind: type) -> None:
        super().__init__(kind.__name__)
        object.__setattr__(self, "kind", kind)


def is_tensor(value: Any) -> bool:
    """By its type alone: who asks a stand-in of an attribute for its class looks at it."""
    return issubclass(type(value), Tensor)

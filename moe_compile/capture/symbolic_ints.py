"""`int(count)` in a forward: a size that is not known stays what it is.

Python's `int` would ask for the number, which differs from call to call. So the name `int` means
something else in the files that define the traced modules, for as long as they are traced.
"""

import contextlib
import inspect
from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _Meta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


class SymbolicInt(int, metaclass=_Meta):
    """`int`, which returns symbolic sizes, and the symbolic values of tensors, as they are."""

    def __new__(cls, value: Any = 0, *base: Any) -> Any:
        """The number, or what stands for it."""
        if isinstance(value, Tensor):
            value = value.item()
        is_size = isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool)
        return value if is_size else int(value, *base)


@contextlib.contextmanager
def symbolic_ints(modules: Iterable[nn.Module]) -> Generator[None]:
    """In it, `int` keeps symbolic sizes in the code of the modules."""
    changed = [names for names in _namespaces(modules) if "int" not in names]
    for names in changed:
        names["int"] = SymbolicInt
    try:
        yield
    finally:
        for names in changed:
            del names["int"]


def _namespaces(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The global names of the files that define the modules' classes, but for torch's own."""
    classes = {
        base for root in modules for module in root.modules() for base in type(module).__mro__
    }
    functions = [inspect.unwrap(c.__dict__["forward"]) for c in classes if "forward" in c.__dict__]
    found = {id(f.__globals__): f.__globals__ for f in functions if inspect.isfunction(f)}
    return [names for names in found.values() if not names.get("__name__", "").startswith("torch.")]

"""What a forward leaves behind: attributes of modules, and of plain objects that they hold.

A graph leaves nothing behind, and reads nothing that other code left: such code is refused.
"""

import enum
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moe_compile.capture.untouched import is_tensor

_TABLES = ("_parameters", "_buffers", "_modules")


class Unchanged:
    """A context that forgets what was left on a module, its children and what they hold."""

    def __init__(self, module: nn.Module) -> None:
        self.before = [
            (inner, dict(vars(inner)), [dict(vars(inner)[table]) for table in _TABLES])
            for inner in module.modules()
        ]
        self.attributes = {id(inner): attributes for inner, attributes, _ in self.before}
        held = {id(v): v for inner in module.modules() for v in _held(inner)}
        self.objects = [(value, dict(vars(value))) for value in held.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for inner, attributes, contents in self.before:
            _restore(vars(inner), attributes)
            for table, content in zip(_TABLES, contents, strict=True):
                _restore(attributes[table], content)
        for value, attributes in self.objects:
            _restore(vars(value), attributes)

    def left_on(self, module: nn.Module) -> list[str]:
        """What was left, so far, on a module in it and on objects that it holds: their names."""
        names = _left(vars(module), self.attributes[id(module)])
        held = {id(value) for value in _held(module)}
        for value, attributes in self.objects:
            if id(value) in held:
                names += [f"{type(value).__name__}.{n}" for n in _left(vars(value), attributes)]
        return names


def is_store(leaf: Any) -> bool:
    """Whether a value is an object with a state of its own."""
    plain = (Tensor, nn.Module, type, enum.Enum, torch.SymInt, torch.SymFloat, torch.SymBool)
    return hasattr(leaf, "__dict__") and not issubclass(type(leaf), plain) and not callable(leaf)


def _held(module: nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name[0] != "_" and is_store(value)]


def _left(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The names of new values that hold tensors."""
    new = {name: value for name, value in now.items() if value is not before.get(name)}
    return [name for name, value in new.items() if _holds_tensors(value)]


def _holds_tensors(value: Any) -> bool:
    return any(map(is_tensor, pytree.tree_leaves(value)))


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.clear()
    attributes.update(before)

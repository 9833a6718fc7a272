"""Sizes that depend on data, by the order in which arguments name them.

A loop over experts does the same to each expert's rows, of which there are u0, u1, u2, ...: what an
operator gave for one expert it gives for the next, under other names.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.capture.tensor_form import Form, Forms, expression


class Renaming:
    """Names data-dependent sizes anew, in the order in which it meets them.

    Attributes:
        names: from a size to its new name.
        forms: those that were renamed.
    """

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        self.forms: list[Form] = []

    def key(self, key: Any) -> Any:
        """A key of arguments that is the same for sizes of other names."""
        if isinstance(key, Form):
            return self._form(key) if key.symbols else key
        if isinstance(key, tuple):
            return tuple(map(self.key, key))
        return self._renamed(key) if isinstance(key, sympy.Basic) else key

    def _form(self, form: Form) -> Any:
        """A form as one of its kind, and under which names."""
        self.forms.append(form)
        if form.kind is None:
            own = Renaming()
            place = (own.size(size) for size in (*form.sizes, *form.strides, form.offset))
            form.kind = (*place, form.dtype, form.device), tuple(own.names)
        kind, symbols = form.kind
        return kind, *map(self._name, symbols)

    def size(self, size: Any) -> Any:
        """A size under its new names."""
        return self._renamed(expression(size))

    @property
    def sizes(self) -> dict[Any, torch.SymInt]:
        """The symbolic sizes of what was renamed, by what they are made of."""
        every = (size for form in self.forms for size in (*form.sizes, *form.strides))
        return {expression(size): size for size in every if isinstance(size, torch.SymInt)}

    def _name(self, symbol: sympy.Symbol) -> sympy.Symbol:
        if symbol not in self.names:
            self.names[symbol] = _name(len(self.names), symbol)
        return self.names[symbol]

    def _renamed(self, known: Any) -> Any:
        for symbol in _from_data(known):
            self._name(symbol)
        return known.xreplace(self.names) if _from_data(known) else known


class RenamedForm:
    """The form of a result under new names."""

    def __init__(self, form: Form, renaming: Renaming) -> None:
        self.sizes = [_general(size, renaming) for size in form.sizes]
        self.strides = [_general(stride, renaming) for stride in form.strides]
        self.dtype, self.device = form.dtype, form.device
        self.found: dict[tuple[sympy.Symbol, ...], Form | None] = {}

    def under(self, renaming: Renaming, forms: Forms) -> Form | None:
        """The form under the names of other arguments; None where a size is no sum or product."""
        symbols = tuple(renaming.names)
        if symbols not in self.found:
            self.found[symbols] = self._under(renaming, forms)
        return self.found[symbols]

    def _under(self, renaming: Renaming, forms: Forms) -> Form | None:
        old, known = {new: old for old, new in renaming.names.items()}, renaming.sizes
        sizes, strides = (
            [_size(_xreplaced(size, old), known) for size in part]
            for part in (self.sizes, self.strides)
        )
        if None in (*sizes, *strides):
            return None
        return forms.find(sizes, strides, self.dtype, self.device)


def _general(size: Any, renaming: Renaming) -> Any:
    """A size under new names; one that does not depend on data is itself."""
    return renaming.size(size) if _from_data(expression(size)) else size


def _xreplaced(size: Any, names: dict[Any, Any]) -> Any:
    return size.xreplace(names) if isinstance(size, sympy.Basic) else size


def _size(wanted: Any, known: dict[Any, torch.SymInt]) -> Any:
    """The symbolic size that is made of something, from known ones."""
    if isinstance(wanted, (int, torch.SymInt)):
        return wanted
    if wanted.is_Integer:
        return int(wanted)
    if wanted in known:
        return known[wanted]
    join = _JOINS.get(wanted.func)
    parts = [_size(part, known) for part in wanted.args] if join else [None]
    return None if join is None or None in parts else join(parts)


_JOINS: dict[Any, Callable[[list[Any]], Any]] = {sympy.Add: sum, sympy.Mul: math.prod}


@functools.lru_cache(4096)
def _from_data(size: Any) -> tuple[sympy.Symbol, ...]:
    """The data-dependent sizes that a size is made of, by name."""
    if not isinstance(size, sympy.Basic):
        return ()
    return tuple(sorted(free_unbacked_symbols(size), key=str))


@functools.cache
def _name(number: int, like: sympy.Symbol) -> sympy.Symbol:
    return sympy.Symbol(f"data_{number}", **like.assumptions0)

"""Fake tensors whose operators are run once for arguments of one form.

A trace, the call forms of a unit and what proves a pattern repeat the same operators on the same
symbolic sizes.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_compile.capture.counted_rows import CountedRows
from moe_compile.capture.form_rules import form_of_result
from moe_compile.capture.known_calls import KnownCalls
from moe_compile.capture.renaming import RenamedForm, Renaming
from moe_compile.capture.tensor_form import Form, Formless, Forms, expression, forget, key_of


class RememberingMode(FakeTensorMode):
    """Remembers results that are tensors of sizes which the arguments determine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cache_enabled = False  # torch's own takes as long as most operators
        self.forms = Forms(self)
        self.results: dict[Hashable, Any] = {}
        self.renamed: dict[Hashable, RenamedForm] = {}
        self.calls = KnownCalls(self.forms)
        self.rows = CountedRows(self.forms)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch gives, or tensors of the same forms."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # what most often is asked of a tensor
            return args[0].fake_device
        if not _is_pure(func):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self._forget(args, kwargs)
            return result
        try:
            inputs = (
                key_of(self.forms, args, func.is_view),
                key_of(self.forms, kwargs, func.is_view),
            )
            key = func, torch.get_default_dtype(), *inputs
        except Formless:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.nonzero.default:
            ask: Any = functools.partial(super().__torch_dispatch__, func, types, args, kwargs)
            return self.rows.of(args[0], ask)
        if key not in self.results:
            renaming = Renaming()
            general = renaming.key(key)
            self.results[key] = self._deduced(func, args, kwargs, general, renaming)
            if self.results[key] is None:
                result = super().__torch_dispatch__(func, types, args, kwargs)
                self.results[key] = self._result(result, args, kwargs)
                self._generalize(self.results[key], general, renaming)
                return result
        known = self.results[key]
        if isinstance(known, Form):
            return self.forms.new(known)
        if known is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return pytree.tree_map_only(Form, self.forms.new, known)

    def _deduced(
        self, func: Any, args: Any, kwargs: Any, general: Hashable, renaming: Renaming
    ) -> Any:
        """The result's form, or forms, by a rule, or by that of other data-dependent sizes."""
        renamed = self.renamed.get(general)
        if renamed is not None:
            return renamed.under(renaming, self.forms)
        return form_of_result(self.forms, func, args, kwargs)

    def _generalize(self, result: Any, general: Hashable, renaming: Renaming) -> None:
        if renaming.names and isinstance(result, Form) and expression(result.offset) == 0:
            self.renamed[general] = RenamedForm(result, renaming)

    def _result(self, result: Any, args: Any, kwargs: Any) -> Any:
        """The result with forms in the place of tensors; None where torch is asked each time."""
        given = pytree.tree_leaves((args, kwargs))
        leaves = pytree.tree_leaves(result)
        if not leaves or any(leaf is argument for leaf in leaves for argument in given):
            return None
        try:
            forms = [self.forms.of(leaf) for leaf in leaves]
        except Formless:
            return None
        known = {symbol for argument in given for symbol in self._symbols(argument)}
        if any(form.symbols - known for form in forms):
            return None
        return pytree.tree_map(self.forms.of, result)

    def _symbols(self, argument: Any) -> Any:
        if isinstance(argument, torch.SymInt):
            return free_unbacked_symbols(argument)
        return self.forms.of(argument).symbols if isinstance(argument, Tensor) else ()

    def _forget(self, args: Any, kwargs: Any) -> None:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, FakeTensor):
                forget(leaf)


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether an operator gives tensors, and changes nothing that it is given."""
    gives = isinstance(func, OpOverload) and func.namespace != "prim"  # a device, for one
    return gives and not func._schema.is_mutable

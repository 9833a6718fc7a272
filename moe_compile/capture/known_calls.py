"""What operators of a trace gave before: the forms of their results, from those of arguments.

A fake mode remembers what it is asked, which is below autocast and what an operator is made of.
This is of the operators as code calls them.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compile.capture.renaming import RenamedForm, Renaming
from moe_compile.capture.tensor_form import Forms, key_of
from moe_compile.capture.view_forms import views


class KnownCalls:
    """Forms of results, by an operator and what it was given.

    Data-dependent sizes of other names are as good. What makes new ones is not remembered.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.results: dict[Hashable, Any] = {}

    def result(self, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """The form of a result, or a list of forms; None where it is not known.

        Raises:
            Formless: nothing is known of such arguments.
        """
        viewed = views(self.forms, func, args, kwargs)
        if viewed is not None:
            return viewed
        renaming = Renaming()
        known = self.results.get(self._key(func, args, kwargs, renaming))
        return None if known is None else known.under(renaming, self.forms)

    def learn(self, func: Any, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        """Remembers what an operator gave."""
        if not isinstance(result, Tensor):
            return
        renaming = Renaming()
        key = self._key(func, args, kwargs, renaming)
        given, form = set(renaming.names), self.forms.of(result)
        # A view's offset has no other name, and a tensor that was given is no new one.
        if form.symbols <= given and not func.is_view and form is self.forms.at_start(form):
            self.results[key] = RenamedForm(form, renaming)

    def _key(self, func: Any, args: Any, kwargs: Any, renaming: Renaming) -> Hashable:
        own = key_of(self.forms, (args, kwargs), func.is_view)
        return func, torch.get_default_dtype(), _autocast(args), renaming.key(own)


def _autocast(args: Sequence[Any]) -> torch.dtype | None:
    """The dtype to which autocast may cast what an operator is given."""
    kinds = {a.device.type for a in args if isinstance(a, Tensor)}
    dtypes = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    return dtypes[0] if dtypes else None

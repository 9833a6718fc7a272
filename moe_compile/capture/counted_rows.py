"""How many rows `nonzero` finds: for each further tensor of a form another such size.

A loop over experts asks for every expert which tokens are its own. Torch works out anew each time
how many there may be at most.
"""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from moe_compile.capture.tensor_form import Form, Forms, expression

_CONSTRAIN = "_constrain_range_for_size"
"""Torch's own, which another release may lack: there it only takes longer."""


class CountedRows:
    """What `nonzero` gave of the forms that it was asked for.

    Attributes:
        most: the largest count of a form's elements that are not zero.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.most: dict[Form, int] = {}

    def of(self, tensor: Any, ask: Callable[[], Tensor]) -> Tensor:
        """What `nonzero` gives; torch is asked for the first tensor of a form.

        Of a tensor that it was asked for before, torch knows the size.

        Raises:
            Formless: the tensor has no form.
        """
        form = self.forms.at_start(self.forms.of(tensor))
        if form not in self.most or tensor.nonzero_memo is not None:
            result = ask()
            self._learn(form, result)
            return result
        count: Any = self._count(self.most[form])
        tensor.nonzero_memo = count
        place = (count, tensor.dim()), (1, count), torch.int64, form.device
        return self.forms.new(self.forms.find(*place))

    def _count(self, most: int) -> torch.SymInt:
        env: Any = self.forms.mode.shape_env
        count = env.create_unbacked_symint()
        getattr(env, _CONSTRAIN)(count.node.expr, 0, most)
        return count

    def _learn(self, form: Form, result: Tensor) -> None:
        env: Any = self.forms.mode.shape_env
        count = expression(result.shape[0])
        if isinstance(count, sympy.Symbol) and hasattr(env, _CONSTRAIN):
            self.most[form] = int(env.var_to_range[count].upper)

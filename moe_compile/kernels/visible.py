"""Custom operators whose Triton kernels a compiled graph starts by itself.

An operator that Inductor cannot look into costs a call of the dispatcher, and of Python, for each
kernel: more than the kernel itself takes for few tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.functional_tensor import FunctionalTensorMode

Wrap = Callable[[Any], Any]
"""What is done to a Triton kernel before it is started."""


def as_it_is(kernel: Any) -> Any:
    """For kernels that start at once."""
    return kernel


def show_kernels(op: CustomOpDef, launch: Callable[..., Any]) -> None:
    """Where a graph with `op` is compiled for a GPU, the kernels that it starts are put there.

    Args:
        op: takes a tensor first.
        launch: does what `op` does on a GPU, given its arguments and, as `wrap`, what to do to
            each kernel first; None where it cannot.
    """

    def replace(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        # A graph that is read, not run, keeps the operator.
        if mode.export or not args[0].is_cuda:
            return mode.__torch_dispatch__(func, types, args, kwargs)
        with mode:
            return launch(*args, **kwargs, wrap=torch.library.wrap_triton)

    op.register_torch_dispatch(FunctionalTensorMode, replace)

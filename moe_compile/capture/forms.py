"""The ways in which a unit is called: with a mask or none, training or not, under autocast or not.

The whole unit is captured in the first of them. In the others only the modules that were
rewritten are captured, and only where they are called in another form or ask for the mode.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from moe_compile.capture.every_expert import traceable
from moe_compile.capture.probe import Call
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.trace import Mode, autocast
from moe_compile.capture.unchanged import Unchanged

Form = tuple[Call, torch.dtype | None]
"""A call, and the dtype of autocast."""


def call_forms(call: Call, autocast: bool) -> list[Form]:
    """The foreseen calls of a unit, without and with `autocast`; the plain call first.

    On fake tensors transformers always builds a boolean mask; on real ones it passes None when the
    mask would hide nothing but the future. Trainers put any model under autocast to bfloat16.
    """
    unmasked = _without_masks(call)
    calls = [call] if unmasked.key() == call.key() else [unmasked, call]
    dtypes = (None, torch.bfloat16) if autocast else (None,)
    return [(form, dtype) for form in calls for dtype in dtypes]


def observe(
    shadow: Shadow,
    unit: nn.Module,
    call: Call,
    dtype: torch.dtype | None,
    paths: Iterable[str],
    seen: dict[str, Call],
) -> None:
    """Notes in `seen` how a training call of a unit, under autocast, calls the modules at `paths`.

    What was seen before the unit's own code fails stays. Of experts in a loop over those that are
    hit a few are run, where that calls all of the modules.
    """
    paths = list(paths)
    with contextlib.suppress(Exception):  # it may be for the experts that were left out
        left_out = _observe(shadow, unit, call, dtype, paths, seen, sampled=True)
        if not left_out or seen.keys() >= set(paths):
            return
    _observe(shadow, unit, call, dtype, paths, seen, sampled=False)


def _observe(
    shadow: Shadow,
    unit: nn.Module,
    call: Call,
    dtype: torch.dtype | None,
    paths: list[str],
    seen: dict[str, Call],
    *,
    sampled: bool,
) -> bool:
    """The same, of a few experts or of all; whether some were left out."""
    unit.train()
    ambient = autocast(Mode(True, dtype), shadow.device)
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(_watch(unit.get_submodule(path), path, seen).remove)
        stack.enter_context(Unchanged(unit))
        contexts = (shadow.mode, enable_python_dispatcher(), shadow.unfixed_sizes())
        for context in (*contexts, torch.no_grad()):
            stack.enter_context(context)
        answers = stack.enter_context(traceable(unit, sampled=sampled))
        stack.enter_context(ambient)
        own = call.fresh()
        unit(*own.args, **own.kwargs)
    return answers.left_out


def children_calls(shadow: Shadow, unit: nn.Module, call: Call) -> dict[str, Call]:
    """How a unit calls those of its children that have parameters, as far as its code gets."""
    children: dict[str, nn.Module] = {}
    for name, child in unit.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            children |= {f"{name}.{inner}": module for inner, module in child.named_children()}
        else:
            children[name] = child
    paths = [name for name, child in children.items() if next(child.parameters(), None) is not None]
    seen: dict[str, Call] = {}
    with contextlib.suppress(Exception):  # its own code failed before, too: some children remain
        observe(shadow, unit, call, None, paths, seen)
    return seen


def _watch(module: nn.Module, path: str, seen: dict[str, Call]) -> Any:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(path, Call(args, kwargs).fresh())

    return module.register_forward_pre_hook(record, with_kwargs=True)


def _without_masks(call: Call) -> Call:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    args, kwargs = pytree.tree_unflatten([None if _is_mask(x) else x for x in leaves], spec)
    return Call(args, kwargs)


def _is_mask(leaf: Any) -> bool:
    """A boolean tensor over pairs of positions."""
    if not isinstance(leaf, Tensor) or leaf.dtype != torch.bool or leaf.dim() < 2:
        return False
    sizes: list[Any] = list(leaf.shape[-2:])
    return isinstance(sizes[0], torch.SymInt) and str(sizes[0]) == str(sizes[1])

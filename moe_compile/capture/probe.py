"""How a model calls its layers: one forward on fake tensors, recorded at every unit.

A *unit* is what is captured and stamped: each child of an outermost `ModuleList` (a layer), and
each module beside the layers (the final norm, the embedding). Of a model without layers it is each
child, or the model, where its own code may be that of experts. A unit that is built and called
like one before it is not run again, so a probe takes about the same time at any depth.
"""

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from moe_compile.adapters import transformers as hf
from moe_compile.capture.every_expert import traceable
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.unchanged import Unchanged, is_store
from moe_compile.capture.untouched import UntouchedStore


@dataclass(frozen=True)
class Call:
    """The arguments of one unit's call: fake tensors with symbolic sizes, and plain values.

    Attributes:
        problem: why the unit's own code could not run on fake tensors, or None.
        state: what other code has left where the unit's code may look, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    problem: str | None = None
    state: str | None = None

    def key(self) -> Hashable:
        """What two calls must share to be one call form: structure, dtypes, shapes and values."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return str(spec), tuple(map(_leaf_key, leaves))

    def stores(self) -> list[Any]:
        """The arguments in which tensors may be kept, such as a key-value cache."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if is_store(leaf)]

    def fresh(self) -> "Call":
        """The same call, with copies of its stores."""
        return self._with_stores(_copy)

    def without_stores(self) -> "Call":
        """The same call, with stand-ins for its stores."""
        return self._with_stores(lambda store: UntouchedStore(type(store)))

    def _with_stores(self, change: Callable[[Any], Any]) -> "Call":
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        changed = [change(leaf) if is_store(leaf) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(changed, spec)
        return Call(args, kwargs, self.problem)


@dataclass(frozen=True)
class Probe:
    """What a forward of the model showed.

    Attributes:
        calls: the call of every unit that it reached.
        inputs: what it was given, in words.
        problem: why the model's own code did not get to its end, or None.
    """

    calls: dict[str, Call]
    inputs: str
    problem: str | None = None


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The model's units by name, in the order of `named_modules`; the model's own name is ""."""
    if _has_layers(model):
        return dict(_units(model, ""))
    if _runs_experts(model):
        return {"": model}
    children = model.named_children()
    return {name: child for name, child in children if next(child.parameters(), None) is not None}


def probe(shadow: Shadow, example_inputs: tuple[Any, ...] | dict[str, Any] | None) -> Probe:
    """The call of every unit that one training forward of the model reaches.

    A model of transformers is tried with one kind of call after the other until its code gets to
    its end; where it never does, the call that reached the most units counts.

    Args:
        shadow: the model's fake copy.
        example_inputs: positional or keyword arguments of the model, needed when it is no
            `PreTrainedModel`. Dimension 0 is the batch; dimension 1 of token ids, and of tensors
            with three dimensions or more, is the sequence.
    """
    best: Probe | None = None
    for inputs, call in _model_calls(shadow, example_inputs):
        found = _probe(shadow, inputs, call)
        if best is None or len(found.calls) > len(best.calls) or found.problem is None:
            best = found
        if found.problem is None:
            break
    assert best is not None, "there is a call to try"
    return best


def _probe(shadow: Shadow, inputs: str, call: Call, *, sampled: bool = True) -> Probe:
    problem: str | None = None
    with Unchanged(shadow.model) as before:
        recorder = _Recorder(shadow, before)
        for name, unit in units(shadow.model).items():
            recorder.attach(name, unit)
        contexts = (shadow.mode, enable_python_dispatcher(), shadow.unfixed_sizes())
        with contextlib.ExitStack() as stack:
            for context in (*contexts, torch.no_grad()):
                stack.enter_context(context)
            answers = stack.enter_context(traceable(shadow.model, sampled=sampled))
            try:
                shadow.model(*call.args, **call.kwargs)
            except Exception as error:  # any failure of foreign code is a reason in the report
                problem = describe(error)
    missed = units(shadow.model).keys() - recorder.calls.keys()
    beside = {_list_of(name) for name in recorder.calls} & {_list_of(name) for name in missed}
    if answers.left_out and (problem is not None or beside - {None}):
        # It may be for the experts that were left out.
        return _probe(shadow, inputs, call, sampled=False)
    return Probe(recorder.calls, inputs, problem)


def _list_of(name: str) -> str | None:
    """The name of the list that a unit is in, or None."""
    holder, _, last = name.rpartition(".")
    return holder if last.isdigit() else None


def _model_calls(shadow: Shadow, example_inputs: Any) -> Iterator[tuple[str, Call]]:
    """Calls of the whole model, each in words too."""
    with shadow.mode:
        if example_inputs is None:
            sizes = shadow.batch, shadow.sequence, shadow.device
            for inputs, kwargs in hf.probe_inputs(shadow.model, *sizes):
                yield inputs, Call((), kwargs)
        elif isinstance(example_inputs, dict):
            yield "a call with the example inputs", Call((), _symbolic(example_inputs, shadow))
        else:
            yield "a call with the example inputs", Call(_symbolic(example_inputs, shadow), {})


def describe(error: Exception) -> str:
    """A failure of foreign code in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def structure(module: nn.Module) -> Hashable:
    """What two modules must share to be captured once: classes, forwards, tensors, hooks."""
    return tuple(
        (
            name,
            type(child),
            tuple(
                (n, tuple(t.shape), t.stride(), t.dtype, t.requires_grad)
                for n, t in [*child._parameters.items(), *child._buffers.items()]
                if t is not None
            ),
            len(child._forward_hooks) + len(child._forward_pre_hooks),
            _own_forward(child),
        )
        for name, child in module.named_modules()
    )


def _own_forward(module: nn.Module) -> Any:
    """A forward that somebody put on the module itself; None where it is its class's."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", forward)


class _Recorder:
    """Stands in for the `forward` of every unit of a shadow while it is probed."""

    def __init__(self, shadow: Shadow, before: Unchanged) -> None:
        self.shadow, self.before = shadow, before
        self.calls: dict[str, Call] = {}
        self.outputs: dict[Hashable, Any] = {}

    def attach(self, name: str, unit: nn.Module) -> None:
        original, kind = unit.forward, structure(unit)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = replace(Call(args, kwargs).fresh(), state=self._state(name, unit))
            key = (kind, call.key())
            if key not in self.outputs or call.stores():
                self.outputs[key], problem = self._run(original, args, kwargs)
                call = replace(call, problem=problem)
            self.calls.setdefault(name, call)
            return pytree.tree_map_only(Tensor, torch.empty_like, self.outputs[key])

        unit.forward = forward

    def _state(self, name: str, unit: nn.Module) -> str | None:
        """What code left on the unit before its first call."""
        if name in self.calls:
            return None
        left = [where for inner in unit.modules() for where in self.before.left_on(inner)]
        return left[0] if left else None

    def _run(self, original: Any, args: Any, kwargs: Any) -> tuple[Any, str | None]:
        try:
            return original(*args, **kwargs), None
        except Exception as error:  # any failure of foreign code is a reason in the report
            leaves = pytree.tree_leaves((args, kwargs))
            hidden = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
            return hidden, describe(error)


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Layers, and beside them the largest modules that hold none but have parameters."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", layer) for i, layer in child.named_children())
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _units(child, path)
        elif next(child.parameters(), None) is not None:
            yield path, child


def _has_layers(model: nn.Module) -> bool:
    """Whether some list in it is one of layers, not of experts."""
    pairs = ((owner, child) for owner in model.modules() for child in owner.children())
    lists = ((owner, child) for owner, child in pairs if isinstance(child, nn.ModuleList))
    return any(not _are_experts(owner, items) for owner, items in lists)


def _are_experts(owner: nn.Module, items: nn.ModuleList) -> bool:
    """Whether each is a few products, and a projection beside them has an output for each."""
    inner = {part for item in items for part in item.modules()}
    nested = any(next(part.children(), None) for item in items for part in item.children())
    if nested or any(p.dim() > 2 for p in items.parameters()):
        return False
    beside = [p for m in owner.modules() if m not in inner for p in m.parameters(recurse=False)]
    return any(p.dim() == 2 and p.shape[0] == len(items) for p in beside)


def _runs_experts(model: nn.Module) -> bool:
    """Whether the model's own code may be that of experts: of a list of modules, or a stack."""
    lists = any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in model.children())
    return lists or any(p.dim() > 2 for p in model.parameters(recurse=False))


def _symbolic(inputs: Any, shadow: Shadow) -> Any:
    """The example inputs as fake tensors with symbolic batch and sequence."""
    first = next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    sequence = first.shape[1] if _has_sequence(first) else None

    def fake(tensor: Tensor) -> Tensor:
        sizes: list[Any] = list(tensor.shape)
        if sizes and sizes[0] == first.shape[0]:
            sizes[0] = shadow.batch
        if _has_sequence(tensor) and sizes[1] == sequence:
            sizes[1] = shadow.sequence
        return torch.empty(sizes, dtype=tensor.dtype, device=shadow.device)

    return pytree.tree_map_only(Tensor, fake, inputs)


def _has_sequence(tensor: Tensor) -> bool:
    return tensor.dim() >= 3 or (tensor.dim() == 2 and not tensor.is_floating_point())


def _copy(store: Any) -> Any:
    """The object with copies of all that it holds, but with the same tensors."""
    return copy.deepcopy(store, {id(tensor): tensor for tensor in _tensors_in(store, set())})


def _tensors_in(held: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif id(held) not in seen and not isinstance(held, (type, nn.Module)):
        seen.add(id(held))
        parts = held.values() if isinstance(held, dict) else getattr(held, "__dict__", {}).values()
        for part in held if isinstance(held, (list, tuple)) else parts:
            yield from _tensors_in(part, seen)


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return str(tuple(leaf.shape)), leaf.dtype, leaf.device.type
    if isinstance(leaf, (bool, int, float, str, type(None), torch.dtype)):
        return type(leaf), leaf
    return type(leaf), None if is_store(leaf) else id(leaf)

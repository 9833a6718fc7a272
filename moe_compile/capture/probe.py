"""How a model calls its layers: one forward on fake tensors, recorded at every unit.

A *unit* is what is captured and stamped: each child of an outermost `ModuleList` (a layer), and
each module beside the layers (the final norm, the embedding). A unit that is built and called
like one before it is not run again, so a probe takes about the same time at any depth.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from moe_compile.adapters import transformers as hf
from moe_compile.capture.every_expert import traceable
from moe_compile.capture.shadow import Shadow


@dataclass(frozen=True)
class Call:
    """The arguments of one unit's call: fake tensors with symbolic sizes, and plain values.

    `problem` is why the unit's own code could not run on fake tensors, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    problem: str | None = None

    def key(self) -> Hashable:
        """What two calls must share to be one call form: structure, dtypes, shapes and values."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return str(spec), tuple(map(_leaf_key, leaves))


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The model's units by name, in the order of `named_modules`."""
    return dict(_units(model, ""))


def probe(shadow: Shadow, example_inputs: tuple[Any, ...] | None) -> dict[str, Call]:
    """The call of every unit that one training forward of the model reaches.

    Args:
        shadow: the model's fake copy.
        example_inputs: positional arguments of the model, needed when it is no `PreTrainedModel`.
            Dimension 0 is the batch; dimension 1 of token ids, and of tensors with three dimensions
            or more, is the sequence.
    """
    recorder = _Recorder(shadow)
    found = units(shadow.model)
    own = {name: vars(unit)["forward"] for name, unit in found.items() if "forward" in vars(unit)}
    for name, unit in found.items():
        recorder.attach(name, unit)
    with shadow.mode, enable_python_dispatcher(), traceable(), torch.no_grad():
        if example_inputs is None:
            inputs = hf.probe_inputs(shadow.model, shadow.batch, shadow.sequence, shadow.device)
            shadow.model(**inputs)
        else:
            shadow.model(*_symbolic(example_inputs, shadow))
    for name, unit in found.items():
        del unit.forward
        if name in own:
            unit.forward = own[name]
    return recorder.calls


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

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.calls: dict[str, Call] = {}
        self.outputs: dict[Hashable, Any] = {}

    def attach(self, name: str, unit: nn.Module) -> None:
        original, kind = unit.forward, structure(unit)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call(args, kwargs)
            key = (kind, call.key())
            if key not in self.outputs:
                self.outputs[key], call = self._run(original, call)
            self.calls.setdefault(name, call)
            return pytree.tree_map_only(Tensor, torch.empty_like, self.outputs[key])

        unit.forward = forward

    def _run(self, original: Any, call: Call) -> tuple[Any, Call]:
        try:
            return original(*call.args, **call.kwargs), call
        except Exception as error:  # any failure of foreign code is a reason in the report
            problem = describe(error)
            leaves = pytree.tree_leaves((call.args, call.kwargs))
            hidden = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            return hidden, Call(call.args, call.kwargs, problem)


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


def _symbolic(inputs: tuple[Any, ...], shadow: Shadow) -> tuple[Any, ...]:
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


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return str(tuple(leaf.shape)), leaf.dtype, leaf.device.type
    if isinstance(leaf, (bool, int, float, str, type(None), torch.dtype)):
        return type(leaf), leaf
    return type(leaf), id(leaf)

"""What a proof runs, as text: what is spelled alike to the last letter need not be proven again.

A loop over experts is proven in the model's dtype and once more under autocast. A proof runs both
in float64, where nothing tells them apart but casts between floats, which do nothing there.
"""

import hashlib
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from moe_compile.rewrite.expert_bodies import Step
from moe_compile.rewrite.normal_form import aten, value

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.layout, torch.memory_format)


class Unspelled(Exception):
    """Something that text does not say all of."""


class Spelling:
    """The steps of a run, each in a line, with numbers for the nodes."""

    def __init__(self, *inputs: fx.Node | None) -> None:
        self.numbers: dict[Any, int] = {node: i for i, node in enumerate(inputs) if node}
        self.lines = ["an input" for _ in inputs]

    def call(self, node: fx.Node) -> None:
        """Adds a node that is run as it stands; a cast between floats is what it casts."""
        if _is_cast_of_float(node) and node.args[0] in self.numbers:
            self.numbers[node] = self.numbers[node.args[0]]
            return
        if not isinstance(node.target, (OpOverload, BuiltinFunctionType)):
            raise Unspelled
        self._add(node, node.target, node.args, node.kwargs)

    def size(self, node: fx.Node) -> None:
        """Adds a node that is a known size."""
        self._add(node, value(node))

    def step(self, step: Step) -> None:
        """Adds a random function in the place of a part of the experts."""
        reads = (step.ends, step.ids, step.bias_ids, step.norm_ids)
        place = (step.expert, step.missing, step.normed, step.place)
        width = value(step.result).shape[-1]
        self._add(step.result, step.kind, step.inputs, reads, place, width)

    def said(self, *facts: Any) -> str:
        """A digest of the lines and of what else is to be known."""
        return hashlib.sha256("\n".join([*self.lines, self._spelled(facts)]).encode()).hexdigest()

    def _add(self, node: fx.Node, *parts: Any) -> None:
        line = self._spelled(parts)
        self.numbers[node] = len(self.lines)
        self.lines.append(line)

    def _spelled(self, part: Any) -> str:
        if isinstance(part, fx.Node):
            known = self.numbers.get(part)
            return f"like {_shape(part)}" if known is None else f"%{known}"
        if isinstance(part, (list, tuple)):
            return f"({', '.join(map(self._spelled, part))})"
        if isinstance(part, dict):
            return f"{{{', '.join(f'{name}: {self._spelled(v)}' for name, v in part.items())}}}"
        if isinstance(part, torch.device):
            return "a device"  # a proof runs on the CPU
        if isinstance(part, (OpOverload, BuiltinFunctionType, torch.SymInt)):
            return str(part)
        if not isinstance(part, _PLAIN):
            raise Unspelled
        return repr(part)


def _is_cast_of_float(node: fx.Node) -> bool:
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return False
    source, dtype = node.args
    return dtype.is_floating_point and value(source).dtype.is_floating_point  # type: ignore


def _shape(node: fx.Node) -> str:
    """That of a tensor whose values nothing reads."""
    known = value(node)
    if not isinstance(known, Tensor):
        raise Unspelled
    return str(tuple(known.shape))

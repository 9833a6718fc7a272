"""Module boundaries in a trace: where each submodule call begins and ends, and what crosses.

Every submodule of a traced unit gets hooks that put an `enter` and an `exit` node, with its tensor
inputs and outputs, into the graph that is being traced. From them a region can be cut out and put
back as a function.
"""

import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_compile.capture.untouched import UntouchedAttribute, is_tensor

Attribute = tuple[str, str]
"""A module's name inside a unit, and the name of one of its attributes."""


class SizeNeeded(Exception):
    """The traced code turned a symbolic size into a number."""


def enter(call: int, *inputs: Any) -> None:
    """Target of the node before a call's nodes; its arguments are the call's tensor inputs."""


def exit(call: int, *outputs: Any) -> None:
    """Target of the node after a call's nodes; its arguments are the call's tensor outputs."""


@dataclass
class ModuleCall:
    """One call of a submodule, or of a custom `autograd.Function`, inside a unit.

    Attributes:
        path: the module's name inside the unit ("" is the unit itself); None for a function.
        parent: index of the enclosing call.
        inputs: leaves of (args, kwargs), tensors replaced by None.
        tensor_inputs: positions of the tensors among the leaves.
        conditions: what the call's Python code asked of a symbolic size, with the answer.
        assumes: whether its code, so far, got an answer that depends on the routing.
        optional: whether it was made after such an answer: other data may not lead to it.
        leaves: what its code, or that of a call in it, leaves on modules and objects.
        writes: whether its code changes a tensor that it is given.
        sampled: whether the graph has few of the experts that its code runs.
    """

    path: str | None
    parent: int | None
    label: str
    inputs: list[Any]
    input_spec: pytree.TreeSpec
    tensor_inputs: list[int]
    outputs: list[Any] = field(default_factory=list[Any])
    output_spec: pytree.TreeSpec | None = None
    tensor_outputs: list[int] = field(default_factory=list[int])
    conditions: list[tuple[Any, bool]] = field(default_factory=list[tuple[Any, bool]])
    assumes: bool = False
    optional: bool = False
    leaves: list[str] = field(default_factory=list[str])
    writes: bool = False
    sampled: bool = False


class CallLog:
    """The calls of one trace, in order; also a context in which they are recorded.

    `reads` holds every plain attribute that the traced code read: (module path, name) -> value, or
    `OfKind` where the value does not matter. Two modules that differ in one need a capture each.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit
        self.calls: list[ModuleCall] = []
        self.open: list[int] = []
        self.given: list[list[tuple[Tensor, Any]]] = []
        self.reads: dict[Attribute, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Generator[None]:
        """Marks every submodule call, autograd function and size question until the end."""
        with contextlib.ExitStack() as stack:
            for path, module in self.unit.named_modules():
                before = module.register_forward_pre_hook(
                    self._before(path), with_kwargs=True, prepend=True
                )
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._after).remove)
            stack.enter_context(self._functions())
            stack.enter_context(self._questions())
            stack.enter_context(self._numbers())
            stack.enter_context(self._attribute_reads())
            yield

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._begin(path, type(module).__name__, args, kwargs)

        return hook

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._end(output)

    def _begin(self, path: str | None, label: str, args: Any, kwargs: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        where = _tensor_positions(leaves)
        parent = self.open[-1] if self.open else None
        optional = any(self.calls[outer].assumes for outer in self.open)
        self.open.append(len(self.calls))
        call = ModuleCall(path, parent, label, _plain(leaves), spec, where, optional=optional)
        self.calls.append(call)
        tensors = [leaves[i] for i in where]
        self.given.append(list(zip(tensors, _mark(enter, self.open[-1], tensors), strict=True)))

    def _end(self, output: Any) -> None:
        leaves, spec = pytree.tree_flatten(output)
        index = self.open.pop()
        call = self.calls[index]
        call.outputs, call.output_spec = _plain(leaves), spec
        call.tensor_outputs = _tensor_positions(leaves)
        _mark(exit, index, [leaves[i] for i in call.tensor_outputs])
        call.writes = any(_traced(tensor) is not value for tensor, value in self.given.pop())

    def assume(self) -> None:
        """Notes that the code of the innermost open call got an answer that depends on data."""
        if self.open:
            self.calls[self.open[-1]].assumes = True

    def sample(self) -> None:
        """Notes that the code of the innermost open call was told of few of its experts."""
        if self.open:
            self.calls[self.open[-1]].sampled = True

    def leave(self, path: str, names: list[str]) -> None:
        """Notes what was left on the module at a path: its own code, or its caller's, left it."""
        if not names:
            return
        calls = [i for i, call in enumerate(self.calls) if call.path == path]
        callers = [self.calls[i].parent for i in calls]
        for i in {*calls, *callers} if calls else range(len(self.calls)):
            if i is not None:
                self.calls[i].leaves += names
        for name in names:  # what was left is not what was there to be read
            self.reads.pop((path, name), None)

    def _functions(self) -> Any:
        """Marks custom autograd functions: tracing drops their backward, so nothing may cut in."""
        original: Any = vars(torch.autograd.Function)["apply"]  # unbound, of Python or of C
        log = self

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if proxy_tensor.get_proxy_mode() is None:  # in an operator, below the trace
                return original.__get__(None, cls)(*args, **kwargs)
            log._begin(None, cls.__name__, args, kwargs)
            output = original.__get__(None, cls)(*args, **kwargs)
            log._end(output)
            return output

        return mock.patch.object(torch.autograd.Function, "apply", classmethod(apply))

    def _questions(self) -> Any:
        """Notes every `if` on a symbolic size: the graph holds only for sizes that answer alike."""
        original: Any = torch.SymBool.__bool__
        log = self

        def ask(condition: Any) -> bool:
            answer: bool = original(condition)
            expr = condition.node.expr
            if _asked_by_torch():
                return answer
            if free_unbacked_symbols(expr):
                log.assume()
            elif log.open:
                log.calls[log.open[-1]].conditions.append((expr, answer))
            return answer

        return mock.patch.object(torch.SymBool, "__bool__", ask)

    def _numbers(self) -> Any:
        """Notes every float that is computed from a symbolic size, and refuses every int.

        A float is baked into the graph, which then holds for sizes that give the same one. An int
        would fix the size in every later trace.
        """
        guard_float: Any = SymNode.guard_float
        log = self

        def as_float(node: Any, *where: Any) -> float:
            number: float = guard_float(node, *where)
            if log.open:
                condition = sympy.Eq(node.expr, number, evaluate=False)
                log.calls[log.open[-1]].conditions.append((condition, True))
            return number

        def as_int(node: Any, *_: Any) -> int:
            raise SizeNeeded(f"the code needs the value of the size {node.expr}")

        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(SymNode, "guard_float", as_float))
        stack.enter_context(mock.patch.object(SymNode, "guard_int", as_int))
        return stack

    def _attribute_reads(self) -> Any:
        paths = {id(module): path for path, module in self.unit.named_modules()}
        log = self

        def getattribute(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            plain = not name.startswith("_") and name in object.__getattribute__(module, "__dict__")
            if plain and log.open and id(module) in paths:
                is_hidden = isinstance(value, UntouchedAttribute)
                read = object.__getattribute__(value, "kind") if is_hidden else value
                log.reads[paths[id(module)], name] = read
            return value

        return mock.patch.object(nn.Module, "__getattribute__", getattribute)


def _asked_by_torch() -> bool:
    """Whether torch itself asks (broadcasting, strides): the answer then changes no graph."""
    frame = sys._getframe(2)
    return frame.f_globals.get("__name__", "").split(".")[0] in {"torch", "sympy"}


def _tensor_positions(leaves: list[Any]) -> list[int]:
    return [i for i, leaf in enumerate(leaves) if is_tensor(leaf)]


def _plain(leaves: list[Any]) -> list[Any]:
    return [None if is_tensor(leaf) else leaf for leaf in leaves]


def _mark(boundary: Callable[..., None], call: int, tensors: list[Tensor]) -> list[Any]:
    """Adds a boundary's node to the graph of the running trace; returns what it knows them by."""
    tracer = _tracer()
    values = [_traced(tensor) for tensor in tensors]
    arguments = [tracer.create_arg(value) for value in values]
    tracer.create_node("call_function", boundary, (call, *arguments), {})
    return values


def _traced(tensor: Tensor) -> Any:
    """What the tracer knows a tensor's value by; a constant is known by itself."""
    if isinstance(tensor, FunctionalTensor):
        tensor = tensor.from_functional()
    known = proxy_tensor.get_proxy_slot(tensor, _tracer(), None)
    return tensor if known is None else known.proxy


def _tracer() -> Any:
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None, "module calls are recorded while they are traced"
    return mode.tracer

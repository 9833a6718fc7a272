"""Captures small functions as units, runs passes on them, compares the spellings of a pattern."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_compile.capture.boundary import enter, exit
from moe_compile.capture.probe import Call
from moe_compile.capture.shadow import Shadow, cast_shadow
from moe_compile.capture.trace import Mode, trace
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.passes import Normalize
from moe_compile.passes.facts import NORMALIZED
from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.pattern import Pattern, Template
from moe_compile.rewrite.raising import RaisePass
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.verify.parity import prove  # the oracle, with the meaning of our operators

BATCH, SEQUENCE = 3, 5
"""Inputs of these sizes are captured with a symbolic batch and sequence."""

Function = Callable[..., Any]


class Idiom(nn.Module):
    """A function with parameters."""

    def __init__(self, function: Function, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_parameters()))


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, the same at each call."""
    generator = torch.Generator().manual_seed(len(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def capture(module: nn.Module, *inputs: Tensor, mode: Mode | None = None) -> UnitGraph:
    """The module as a unit, called with inputs like the given ones; normalized."""
    shadow = cast_shadow(module)
    with shadow.mode:
        fakes = tuple(_fake(x, shadow) for x in inputs)
    captured = trace(shadow, shadow.model, Call(fakes, {}), mode or Mode(), set())
    return UnitGraph.of("unit", captured, {})


def unit_of(function: Function, *inputs: Tensor, **parameters: Tensor) -> UnitGraph:
    """A function and its parameters as a unit, in normal form."""
    unit = capture(Idiom(function, parameters), *inputs)
    Normalize().run(unit)
    return unit


def _fake(x: Tensor, shadow: Shadow) -> Tensor:
    symbols: dict[int, Any] = {BATCH: shadow.batch, SEQUENCE: shadow.sequence}
    return torch.empty([symbols.get(size, size) for size in x.shape], dtype=x.dtype)


def calls(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute something, in order."""
    functions = [node for node in graph.nodes if node.op == "call_function"]
    return [node for node in functions if node.target not in (enter, exit)]


def op_names(unit: UnitGraph) -> list[str]:
    """What the graph computes, in order, sizes left out."""
    values = [n for n in calls(unit.graph) if not isinstance(n.meta["val"], torch.SymInt)]
    return [_name(node.target) for node in values]


def _name(target: Any) -> str:
    if isinstance(target, CanonicalOp):
        return target.name
    return str(target).removeprefix("aten.").partition(".")[0]


def parameters_of(unit: UnitGraph) -> list[str]:
    """The names of the parameters that the graph reads."""
    return sorted(str(node.target) for node in unit.graph.nodes if node.op == "get_attr")


def canonical_node(unit: UnitGraph) -> fx.Node:
    """The unit's only canonical op."""
    (node,) = [n for n in unit.graph.nodes if isinstance(n.target, CanonicalOp)]
    return node


def assert_raised(step: RaisePass, unit: UnitGraph, names: Sequence[str]) -> None:
    """The pass leaves these ops, and the parameters as they were; once more it finds nothing."""
    parameters = parameters_of(unit)
    assert step.run(unit) > 0
    assert op_names(unit) == list(names)
    assert parameters_of(unit) == parameters
    assert step.run(unit) == 0


def assert_refused(step: RaisePass, pattern: Pattern, unit: UnitGraph, reason: str) -> None:
    """The pass finds nothing, leaves the unit as it is, and the pattern's near miss says why."""
    before = str(unit.graph)
    assert step.run(unit) == 0
    assert str(unit.graph) == before
    found = unit.near_misses[pattern.name].reason
    assert re.fullmatch(reason, found), found


def assert_gives(step: RaisePass, unit: UnitGraph, fact: Fact) -> None:
    """The pass establishes its fact, keeps the normal form, and signs every node that it made."""
    before = set(unit.graph.nodes)
    held = {f for f in step.breaks if f.holds(unit.graph)}
    assert not fact.holds(unit.graph)
    assert step.run(unit) == 1
    assert fact.holds(unit.graph)
    assert step.gives == {fact}
    assert step.needs == {NORMALIZED}
    assert NORMALIZED.holds(unit.graph)
    assert held == step.breaks == {f for f in held if not f.holds(unit.graph)}
    made = [node for node in unit.graph.nodes if node not in before]
    assert made == [canonical_node(unit)]
    assert [node.meta["made_by"][0] for node in made] == [step.name]
    assert made[0].meta["made_by"][1] in {pattern.name for pattern in step.patterns}


def evaluate(graph: fx.Graph, inputs: Sequence[Tensor], state: Mapping[str, Tensor]) -> list[Any]:
    """The outputs of a unit's graph on real tensors."""
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = state[str(node.target)]
        elif node.target is exit and args[0] == 0:
            return list(args[1:])
        elif node.target not in (enter, exit):
            env[node] = node.target(*args, **kwargs)
    raise AssertionError("a unit ends in its exit")


# A pattern's `before` and `after`.


def spelling(template: Template) -> str:
    """A template as the id of a test: what is present, and the choices that hold."""
    chosen = [name for name, holds in template.choice.items() if holds]
    return "-".join([*template.inputs.values(), *chosen])


def assert_same_algebra(template: Template, **fixed: Any) -> None:
    """`before` and `after` are one function over a prime field, backward too."""
    tensors = _tensors(template, torch.float64)
    prove(*_functions(template, fixed, list(tensors)), list(tensors.values()))


def assert_same_bits(template: Template, dtype: torch.dtype, **fixed: Any) -> None:
    """`before` and `after` give the same bits, backward too."""
    assert template.pattern.exact
    tensors = _tensors(template, dtype)
    before, after = _functions(template, fixed, list(tensors))
    want, got = (_results(function, list(tensors.values())) for function in (before, after))
    assert [x.dtype for x in got] == [x.dtype for x in want]
    assert all(map(torch.equal, got, want))


def _tensors(template: Template, dtype: torch.dtype) -> dict[str, Tensor]:
    pattern = template.pattern
    return {
        name: normal(*pattern.shapes[name], dtype=dtype)
        for name in template.inputs.values()
        if name not in pattern.integers
    }


def _functions(
    template: Template, fixed: Mapping[str, Any], names: Sequence[str]
) -> tuple[Function, Function]:
    rest = dict.fromkeys(template.absent) | dict(fixed) | dict(template.choice)

    def over_tensors(function: Function) -> Function:
        return lambda *xs: function(**dict(zip(names, xs, strict=True)), **rest)

    return over_tensors(template.pattern.before), over_tensors(template.pattern.after)


def _results(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, dtype=out.dtype))]

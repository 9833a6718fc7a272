"""From an activation's graph to the source of Triton kernels: itself, and its derivative.

An activation between two expert products maps rows of N numbers to rows of I. Where every number
of the result comes from one number of each of some columns of the row (gate and up, side by side or
interleaved, or all of it), it is a function of single numbers. That function and its derivative,
which torch works out, are written down in Triton's language, in float32.
"""

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Columns:
    """Every `step`-th column from `start`, `count` of them."""

    start: int
    step: int
    count: int

    def numbers(self) -> range:
        """Which they are."""
        return range(self.start, self.start + self.count * self.step, self.step)

    def sliced(self, start: int, end: int, step: int) -> "Columns":
        """What a slice of them holds."""
        own = range(self.count)[start:end:step]
        return Columns(self.start + own.start * self.step, self.step * step, len(own))


@dataclass(frozen=True)
class Expressions:
    """Lines of assignments, and the names of what they compute."""

    lines: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class ActivationSource:
    """An activation of single numbers.

    Attributes:
        columns: where its arguments are in a row; together they are the row. Called x0, x1, ...
        width: I, the numbers in a row of the result.
        forward: gives the result.
        backward: gives the result and the gradient of every argument, of the result's, `grad`.
    """

    columns: tuple[Columns, ...]
    width: int
    forward: Expressions
    backward: Expressions


def activation_source(graph: fx.Graph, width: int) -> ActivationSource | None:
    """The source of an activation of rows of `width`; None for what is no function of numbers."""
    split = _split(graph, width)
    if split is None:
        return None
    columns, scalar = split
    run: Callable[..., Tensor] = fx.GraphModule({}, scalar)

    def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        result, pull_back, *_ = torch.func.vjp(run, *inputs)
        return result, *pull_back(grad)

    inputs = [torch.ones(2) for _ in columns]
    names = [f"x{i}" for i in range(len(columns))]
    try:
        forward = _expressions(run, inputs, names)
        both = _expressions(backward, [torch.ones(2), *inputs], ["grad", *names])
    except _Unknown:
        return None
    return ActivationSource(tuple(columns), columns[0].count, forward, both)


def _split(graph: fx.Graph, width: int) -> tuple[list[Columns], fx.Graph] | None:
    """The columns that the activation reads, and the rest of it as a function of those."""
    scalar, env = fx.Graph(), dict[fx.Node, Any]()
    leaves: dict[Columns, fx.Node] = {}

    def leaf(node: fx.Node) -> fx.Node:
        found = env[node]
        if isinstance(found, Columns):
            if found not in leaves:
                # Placeholders come first, whenever they are met.
                last = next(reversed(leaves.values()), None)
                with scalar.inserting_after(last):  # pyright: ignore[reportArgumentType]
                    leaves[found] = scalar.placeholder(f"x{len(leaves)}")
            found = leaves[found]
        return found

    for node in graph.nodes:
        if node.op == "placeholder":
            if env:
                return None
            env[node] = Columns(0, 1, width)
        elif node.op == "output":
            scalar.output(leaf(node.args[0]))
        elif node.target is aten.slice.Tensor and isinstance(env[node.args[0]], Columns):
            sliced = _sliced(env[node.args[0]], *node.args[1:])
            if sliced is None:
                return None
            env[node] = sliced
        elif node.target in _CASTS:
            env[node] = leaf(node.args[0])
        else:
            env[node] = scalar.node_copy(node, leaf)
    read = sorted(itertools.chain(*(columns.numbers() for columns in leaves)))
    counts = {columns.count for columns in leaves}
    return (list(leaves), scalar) if read == list(range(width)) and len(counts) == 1 else None


def _sliced(
    columns: Columns, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Columns | None:
    known = all(isinstance(value, (int, type(None))) for value in (start, end, step))
    if dim not in (1, -1) or not known:
        return None
    return columns.sliced(start or 0, columns.count if end is None else end, step)


class _Unknown(Exception):
    """An operation that has no spelling here."""


def _expressions(run: Callable[..., Any], inputs: list[Tensor], names: list[str]) -> Expressions:
    """What `run` computes, number by number."""
    functional = torch.func.functionalize(run)
    traced = make_fx(functional, decomposition_table=_DECOMPOSITIONS)(*inputs)
    given, lines, known = iter(names), list[str](), dict[fx.Node, str]()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            results = node.args[0]
            found = results if isinstance(results, (tuple, list)) else (results,)
            return Expressions(tuple(lines), tuple(known[result] for result in found))
        else:
            known[node] = f"v{len(lines)}"
            lines.append(f"{known[node]} = {_expression(node, known)}")
    raise AssertionError("a traced function returns")


def _expression(node: fx.Node, known: dict[fx.Node, str]) -> str:
    spelling = _SPELLINGS.get(node.target)
    if spelling is None or node.kwargs.keys() - _KINDS:
        raise _Unknown
    return spelling(*(_argument(argument, known) for argument in node.args))


def _argument(value: Any, known: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise _Unknown
    if value is None:
        return "None"
    return repr(float(value)) if math.isfinite(value) else f"float('{float(value)}')"


def _infix(sign: str) -> Callable[..., str]:
    return lambda a, b: f"({a} {sign} {b})"


def _call(function: str) -> Callable[..., str]:
    return lambda *arguments: f"{function}({', '.join(arguments)})"


def _extreme(function: str) -> Callable[[str, str], str]:
    return lambda a, b: f"tl.{function}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


_maximum, _minimum = _extreme("maximum"), _extreme("minimum")


def _clamp(x: str, low: str = "None", high: str = "None") -> str:
    x = x if low == "None" else _maximum(x, low)
    return x if high == "None" else _minimum(x, high)


def _power(x: str, exponent: str) -> str:
    powers = {"1.0": x, "0.5": f"tl.sqrt({x})", "2.0": f"({x} * {x})", "3.0": f"({x} * {x} * {x})"}
    if exponent not in powers:
        raise _Unknown
    return powers[exponent]


def _same(x: str, *_: str) -> str:
    return x


_CASTS = {aten.to.dtype, aten._to_copy.default, aten.detach.default, aten.alias.default}
"""What changes no number in float32; a cast to less precision is left out, as a fused one is."""

_KINDS = {"dtype", "layout", "device", "pin_memory", "memory_format"}
"""Keywords that say what kind of tensor to make, not what is in it."""

_SPELLINGS: dict[Any, Callable[..., str]] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, operator.add), _infix("+")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _infix("-")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _infix("*")),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _infix("/")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _infix(">")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _infix(">=")),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _infix("<")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _infix("<=")),
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor), _infix("&")),
    **dict.fromkeys((*_CASTS, aten.clone.default), _same),
    aten.rsub.Scalar: lambda a, b: f"({b} - {a})",
    aten.neg.default: lambda x: f"(-{x})",
    aten.reciprocal.default: lambda x: f"(1.0 / {x})",
    aten.exp.default: _call("tl.exp"),
    aten.log.default: _call("tl.log"),
    aten.erf.default: _call("tl.erf"),
    aten.sqrt.default: _call("tl.sqrt"),
    aten.rsqrt.default: _call("tl.rsqrt"),
    aten.abs.default: _call("tl.abs"),
    aten.sigmoid.default: _call("tl.sigmoid"),
    aten.tanh.default: lambda x: f"(2.0 * tl.sigmoid(2.0 * {x}) - 1.0)",
    aten.relu.default: lambda x: _maximum(x, "0.0"),
    aten.maximum.default: _maximum,
    aten.minimum.default: _minimum,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda x, high: _clamp(x, "None", high),
    aten.pow.Tensor_Scalar: _power,
    aten.where.self: _call("tl.where"),
    aten.scalar_tensor.default: _same,
    aten.full_like.default: lambda _, value: value,
    aten.fill.Scalar: lambda _, value: value,
    aten.empty_like.default: lambda _: "0.0",
    aten.zeros_like.default: lambda _: "0.0",
    aten.ones_like.default: lambda _: "1.0",
}
"""The Triton of each operation on numbers."""

_DECOMPOSITIONS: Any = get_decompositions(
    [
        aten.silu,
        aten.silu_backward,
        aten.gelu,
        aten.gelu_backward,
        aten.sigmoid_backward,
        aten.tanh_backward,
        aten.threshold_backward,
        aten.hardtanh,
        aten.hardtanh_backward,
        aten.leaky_relu,
        aten.leaky_relu_backward,
        aten.square,
        aten.addcmul,
    ]
)

"""What a pattern is: an idiom in plain torch, and the canonical op that it means.

A pattern is one small class. `before` is the idiom as model code spells it, `after` the same in
canonical ops; the parity tests, the exact oracle and the docs all come from these two. The
signature of `before` says what may vary:

* `Tensor`: any value of the graph; `Tensor | None`: present or absent;
* `float`: a literal that the pattern names (all other literals are compared);
* `Callable`: an opaque region, captured as a subgraph (an activation between two GEMMs);
* a keyword-only `bool`: a spelling choice; every combination is tried.
"""

import functools
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moe_compile.capture.remembering_mode import RememberingMode
from moe_compile.capture.trace import trace_function
from moe_compile.rewrite.normal_form import normalize

_SENTINEL = 0.8414709848078965


class Pattern:
    """An idiom. Subclasses are stateless and live one a file in `patterns/`.

    Attributes:
        name: the idiom, a noun; also the file's name.
        kind: what a report calls the site (`rms_norm`, `attention`, ...).
        shapes: example sizes of the tensor arguments, used to trace `before`. Any rank and size
            matches: a candidate is compared with `before` traced again on its own inputs.
        integers: the tensor arguments that hold indices.
        exact: whether `after` gives the same bits as `before`.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    shapes: ClassVar[Mapping[str, tuple[int, ...]]]
    integers: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True

    before: ClassVar[Callable[..., Tensor]]
    after: ClassVar[Callable[..., Tensor]]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def check(self, match: "Match") -> None:
        """Raises `Refuse` where a structural match must not be rewritten."""

    def applies(self, *_: Any, **choice: Any) -> bool:
        """Whether a combination of present arguments and spelling choices makes sense."""
        return True


@dataclass(frozen=True)
class Match:
    """An idiom found in a graph. Nothing has been changed yet.

    Attributes:
        bindings: argument name -> graph node, literal or `Region`.
        choice: the spelling choices that held.
        root: the node whose value the idiom computes.
        nodes: every node of the idiom, root included.
    """

    pattern: Pattern
    bindings: Mapping[str, Any]
    choice: Mapping[str, bool]
    root: fx.Node
    nodes: frozenset[fx.Node] = field(repr=False)

    def value(self, name: str) -> Any:
        """The fake tensor that is bound to an argument, or the literal itself."""
        bound = self.bindings[name]
        return bound.meta["val"] if isinstance(bound, fx.Node) else bound


@dataclass(frozen=True)
class Template:
    """One spelling of a pattern, traced on example inputs: what the matcher looks for.

    `inputs` maps the placeholders to argument names, `literals` the sentinel values to theirs;
    a region stands in the graph as a call of `region`.
    """

    pattern: Pattern
    choice: Mapping[str, bool]
    absent: frozenset[str]
    graph: fx.Graph
    inputs: Mapping[fx.Node, str]
    literals: Mapping[Any, str]

    @property
    def size(self) -> int:
        """How many operations the spelling has."""
        return sum(node.op == "call_function" for node in self.graph.nodes)

    @property
    def root(self) -> fx.Node:
        """The node that computes the idiom's value."""
        return output_value(self.graph)


_LIBRARY = torch.library.Library("moe_compile_pattern", "FRAGMENT")
_LIBRARY.define("region(Tensor input, int width) -> Tensor")


@torch.library.impl(_LIBRARY, "region", "CompositeExplicitAutograd")
def _region(input: Tensor, width: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], width)


REGION = torch.ops.moe_compile_pattern.region.default


def output_value(graph: fx.Graph) -> fx.Node:
    """The node that a graph with a single output returns."""
    (value,) = next(iter(reversed(graph.nodes))).all_input_nodes
    return value


@functools.cache
def templates(pattern: Pattern) -> tuple[Template, ...]:
    """Every spelling of a pattern, the most specific first; traced once per process."""
    arguments = signature(pattern)
    optional = [name for name, kind in arguments.items() if kind == "optional"]
    flags = [name for name, kind in arguments.items() if kind == "flag"]
    found = [
        _template(pattern, arguments, choice)
        for choice in _choices([*optional, *flags])
        if pattern.applies(**choice)
    ]
    return tuple(sorted(found, key=lambda template: -template.size))


def signature(pattern: Pattern) -> dict[str, str]:
    """Argument name -> tensor, optional, float, region or flag."""
    hints = typing.get_type_hints(pattern.before)
    parameters = inspect.signature(pattern.before).parameters
    return {name: _argument_kind(hints[name]) for name in parameters}


def _argument_kind(hint: Any) -> str:
    simple: dict[Any, str] = {Tensor: "tensor", float: "float", bool: "flag"}
    if hint in simple:
        return simple[hint]
    if isinstance(hint, types.UnionType):
        return "optional"
    return "region"


def _choices(names: list[str]) -> Iterator[dict[str, bool]]:
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _template(pattern: Pattern, kinds: dict[str, str], choice: dict[str, bool]) -> Template:
    flags = {name: value for name, value in choice.items() if kinds[name] == "flag"}
    absent = frozenset(n for n, k in kinds.items() if k == "optional" and not choice[n])
    mode = _example_mode()
    tensors = [n for n, k in kinds.items() if k in ("tensor", "optional") and n not in absent]
    with mode:
        values = [_example(pattern, name) for name in tensors]
    fixed: dict[str, Any] = dict.fromkeys(absent) | flags
    literals: dict[Any, str] = {}
    for i, (name, kind) in enumerate(kinds.items()):
        if kind == "float":
            fixed[name] = _SENTINEL + i / 1000
            literals[fixed[name]] = name
        if kind == "region":
            fixed[name] = functools.partial(REGION, width=pattern.shapes[name][0])

    def before(*inputs: Tensor) -> Tensor:
        return pattern.before(**dict(zip(tensors, inputs, strict=True)), **fixed)

    with mode:
        graph = trace_function(before, values)
        normalize(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, tensors, strict=True))
    return Template(pattern, flags, absent, graph, inputs, literals)


@functools.cache
def _example_mode() -> RememberingMode:
    """Of every pattern's example inputs: their spellings repeat the same operators."""
    return RememberingMode()


def _example(pattern: Pattern, name: str) -> Tensor:
    dtype = torch.int64 if name in pattern.integers else torch.bfloat16
    return torch.empty(pattern.shapes[name], dtype=dtype)

"""What each expert computes: two matrix products with that expert's own weights.

A *body* is the part of a graph between the rows that an expert gets and the rows that it gives
back. Which rows these are, and what becomes of them, is not looked at here: see `routing`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from moe_compile.ops.experts import normed
from moe_compile.rewrite.normal_form import aten, schema_names, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import Region

TRANSPARENT = {aten.to.dtype, aten.clone.default, aten.detach.default}
"""What leaves a weight what it is."""


@dataclass(frozen=True)
class Stack:
    """One weight of every expert.

    Attributes:
        parts: each expert's own node, in their order; or the one node that holds all of them.
        transposed: whether an expert's weight is [in, out].
    """

    parts: tuple[fx.Node, ...]
    transposed: bool = False

    @property
    def count(self) -> int:
        """How many experts it has something for."""
        first, *others = self.parts
        return len(self.parts) if others else value(first).shape[0]


@dataclass(frozen=True)
class Stacks:
    """An argument of the canonical op: stacks side by side, all lying alike.

    They are put together in the graph where the model stores them apart.
    """

    stacks: tuple[Stack, ...]
    transposed: bool

    def write(self, proxy: Callable[[fx.Node], fx.Proxy]) -> Any:
        """Appends the nodes that put the stacks together; returns the last one's proxy."""
        written = [self._write_one(stack, proxy) for stack in self.stacks]
        if len(written) == 1:
            return written[0]
        last = value(self.stacks[0].parts[0]).dim() + (len(self.stacks[0].parts) > 1) - 1
        return aten.cat.default(written, last if self.transposed or last == 1 else 1)

    def _write_one(self, stack: Stack, proxy: Callable[[fx.Node], fx.Proxy]) -> Any:
        parts: list[Any] = [proxy(part) for part in stack.parts]
        whole = parts[0] if len(parts) == 1 else aten.stack.default(parts)
        if stack.transposed != self.transposed:
            return aten.transpose.int(whole, 1, 2)
        return whole


@dataclass(frozen=True)
class Step:
    """A part of what experts compute.

    Attributes:
        kind: a first product (`up`), the activation (`act`), or the last product (`down`).
        inputs: the rows; of an activation, the results of the first products.
        result: the node that it ends in.
        expert: whose rows they are. If None, `inputs` are [experts or 1, ..., H], unless there is
        ends: [experts], the end of each expert's rows in [rows, H]; or
        ids: whose each row is; rows lack its dimensions at the positions `missing`.
        bias_ids: whose bias each row gets, where that is said apart.
        normed: whether what an expert gives goes through a norm of its own; or
        norm_ids: whose norm each row goes through.
        place: which of the first products it is.
    """

    kind: Literal["up", "act", "down"]
    inputs: tuple[fx.Node, ...]
    result: fx.Node
    expert: int | None = None
    ends: fx.Node | None = None
    ids: fx.Node | None = None
    missing: tuple[int, ...] = ()
    bias_ids: fx.Node | None = None
    normed: bool = False
    norm_ids: fx.Node | None = None
    place: int = 0

    @property
    def reads(self) -> list[fx.Node]:
        """Every node that it takes."""
        routed = (self.ends, self.ids, self.bias_ids, self.norm_ids)
        return [*self.inputs, *(node for node in routed if node is not None)]


@dataclass(frozen=True)
class Bodies:
    """The bodies of all experts of one block: the same computation on other weights.

    Attributes:
        count: how many experts there are.
        steps: what they compute, in order.
        nodes: everything of the steps, without the weights.
        up: the stacks of the first products, which `activation` takes side by side.
        norm: of what the experts give, see `ops.experts`.
        norm_weight: each expert's own, or the one of all.
    """

    count: int
    steps: tuple[Step, ...]
    nodes: frozenset[fx.Node] = field(repr=False)
    up: tuple[Stack, ...]
    down: Stack
    activation: Region
    up_bias: tuple[Stack, ...] = ()
    down_bias: Stack | None = None
    norm: Region | None = None
    norm_weight: Stack | fx.Node | None = None

    def __post_init__(self) -> None:
        given = (*self.up, self.down, *self.up_bias, self.down_bias, self.norm_weight)
        for stack in given:
            if isinstance(stack, Stack) and stack.count != self.count:
                reason = f"{stack.parts[0]} has parts for {stack.count} experts of {self.count}"
                raise Refuse(reason, stack.parts[0])

    @property
    def rows(self) -> fx.Node:
        """What the first of the first products takes."""
        return self.steps[0].inputs[0]

    @property
    def results(self) -> list[fx.Node]:
        """The results of the last products."""
        return [step.result for step in self.steps if step.kind == "down"]

    @property
    def up_width(self) -> int:
        """What the activation takes of a row."""
        return value(next(iter(self.activation.graph.nodes))).shape[-1]

    @functools.cached_property
    def has_offset(self) -> bool:
        """Whether one may give something for a row of zeros; if not, zeros may stand for none."""
        if self.down_bias is not None or self.up_bias:
            return True
        hidden = self.activation(torch.zeros(1, self.up_width))
        rows = torch.zeros(1, value(self.results[0]).shape[-1])
        weight = None if self.norm_weight is None else torch.ones_like(rows)
        gives = normed(rows, self.norm, weight)
        return not bool((hidden == 0).all() and (gives == 0).all())


def attempt(make: Callable[..., Bodies], *args: Any) -> Bodies | Refuse:
    """What `make` returns, or the refusal that it raises."""
    try:
        return make(*args)
    except Refuse as refusal:
        return refusal


def strip(node: Any) -> Any:
    """A value without casts and copies."""
    while isinstance(node, fx.Node) and node.target in TRANSPARENT:
        node = node.args[0]
    return node


def between(result: Any, sources: set[fx.Node]) -> set[fx.Node] | None:
    """The nodes that lead from `sources`, and from nothing else, to a value."""
    inside: set[fx.Node] = set()
    todo, reached = [result], False
    while todo:
        node = todo.pop()
        if node in sources:
            reached = True
        elif isinstance(node, fx.Node) and node not in inside:
            if len(inside) > 64 or node.op != "call_function":
                return None
            inside.add(node)
            todo += node.all_input_nodes
    return inside if reached else None


def reaches(node: Any, source: fx.Node) -> bool:
    """Whether a value depends on another one."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node is source:
            return True
        if isinstance(node, fx.Node) and node not in seen and node >= source:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def signature_of(node: Any, sources: dict[fx.Node, int], seen: dict[fx.Node, int]) -> str:
    """A spelling of the computation that is equal for equal ones."""
    if isinstance(node, (list, tuple)):
        return f"[{', '.join(signature_of(n, sources, seen) for n in node)}]"
    if not isinstance(node, fx.Node):
        return repr(node)
    if node in sources:
        return f"source {sources[node]}"
    if node in seen:
        return f"value {seen[node]}"
    if node.op == "get_attr":
        return str(node.target)
    parts = [signature_of(a, sources, seen) for a in (*node.args, *node.kwargs.values())]
    seen[node] = len(seen)
    return f"{node.target}({', '.join(parts)}; {list(node.kwargs)})"


def side_by_side(sources: list[fx.Node], result: Any, inner: set[fx.Node]) -> Region:
    """The activation as a function of the first products' results side by side."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    widths = [value(source).shape[-1] for source in sources]
    first: Tensor = value(sources[0])
    with first.fake_mode:  # type: ignore[attr-defined]
        x.meta = {"val": first.new_empty(*first.shape[:-1], sum(widths))}
    env: dict[fx.Node, fx.Node] = {}
    for source, end in zip(sources, torch.tensor(widths).cumsum(0).tolist(), strict=True):
        env[source] = x if len(sources) == 1 else _columns(graph, x, source, end)
    for node in sorted(inner):
        env[node] = graph.node_copy(node, env.__getitem__)
        count_from_back(env[node])
    graph.output(env[result])
    return Region(graph)


def count_from_back(node: fx.Node) -> None:
    """Dimensions as they are for rows of any rank: experts are called with [rows, width]."""
    position = next((i for i, a in enumerate(schema_names(node)) if a == "dim"), None)
    if position is None or position >= len(node.args):
        return
    dims, rank = node.args[position], max(value(n).dim() for n in (node, *node.all_input_nodes))
    if isinstance(dims, int) and dims >= 0:
        node.update_arg(position, dims - value(node).dim())
    elif isinstance(dims, (list, tuple)):
        node.update_arg(position, [dim - rank if dim >= 0 else dim for dim in dims])  # type: ignore[operator]


def _columns(graph: fx.Graph, x: fx.Node, source: fx.Node, end: int) -> fx.Node:
    start = end - value(source).shape[-1]
    node = graph.call_function(aten.slice.Tensor, (x, -1, start, end))
    node.meta = dict(source.meta)
    return node

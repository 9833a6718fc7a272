"""Proves that what surrounds the experts' bodies is a weighted sum over each token's picks.

Tokens reach their experts in many ways: by index lists, masks, sorting, a matrix of weights. None
is matched here. Instead the nodes between the tokens and the result are run as they stand, over a
prime field, with random functions in the place of the bodies, and must give what the canonical op
gives: outputs and gradients, exactly. What is no such sum is disproved.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_compile.ops.experts import experts
from moe_compile.rewrite.expert_bodies import Bodies
from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.verify.in_float64 import InFloat64
from moe_compile.verify.oracle import Disproved, prove

_MOVES = {
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.reshape.default,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.to.dtype,
    aten.mul.Tensor,
}
_Sizes = dict[Any, Any]
_WIDTH = 2
_TRIES = 8


@dataclass(frozen=True)
class Routing:
    """A proven weighted sum.

    Attributes:
        root: the node that is the sum.
        tokens, ids: [T, H] and [T, K], or [T] for one pick.
        weights: [T, K]; or, where `full`, [T, E], of which the picked ones count.
        weigh_input: whether the weight is on an expert's input.
        nodes: what lies between these and the root, bodies included.
    """

    root: fx.Node
    tokens: fx.Node
    ids: fx.Node
    weights: fx.Node
    full: bool
    weigh_input: bool
    nodes: frozenset[fx.Node] = field(repr=False)


def prove_routing(graph: fx.Graph, bodies: Bodies) -> Routing:
    """The weighted sum that a block's bodies are part of.

    Raises:
        Refuse: no node is one; the reason is that of the closest attempt.
    """
    failure = Refuse("the experts' results are never put together", bodies.results[0])
    for root in _roots(graph, bodies):
        for tokens in _token_candidates(bodies.rows[0], root):
            found = _Slice(bodies, root, tokens).search()
            if isinstance(found, Routing):
                return found
            failure = found
    raise failure


def _roots(graph: fx.Graph, bodies: Bodies) -> Iterator[fx.Node]:
    """The first nodes that depend on every body and look like tokens."""
    every = (1 << bodies.count) - 1
    reached = {node: 0 for node in bodies.nodes}
    for i, node in enumerate(bodies.results):
        reached[node] = reached[node] | 1 << i
    width = value(bodies.results[0]).shape[-1]
    found = 0
    for node in graph.nodes:
        for source in node.all_input_nodes:
            reached[node] = reached.get(node, 0) | reached.get(source, 0)
        is_call = node.op == "call_function" and node not in bodies.nodes
        if is_call and reached.get(node) == every and _is_rows(value(node), width):
            yield node
            found += 1
            if found == _TRIES:
                return


def _is_rows(result: Any, width: int) -> bool:
    """Whether it is [any, width]; a width that is computed from counts of rows may be any."""
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.dim() != 2:
        return False
    size: Any = result.shape[1]
    return size == width if isinstance(size, int) else bool(free_unbacked_symbols(size))


def _token_candidates(rows: fx.Node, root: fx.Node) -> Iterator[fx.Node]:
    """What an expert's rows may be taken from, as many as the root has; the furthest first."""
    found: list[fx.Node] = []
    width, count = value(rows).shape[-1], str(value(root).shape[0])
    node: Any = rows
    while isinstance(node, fx.Node):
        result = value(node)
        if _is_rows(result, width) and str(result.shape[0]) == count:
            found.append(node)
        if node.target not in _MOVES:
            break
        node = _moved(node, width)
    return reversed(found)


def _moved(node: fx.Node, width: int) -> Any:
    """The operand that the values come from: of a product, the one as wide as a token."""
    if node.target is not aten.mul.Tensor:
        return node.args[0]
    wide = [a for a in node.all_input_nodes if value(a).shape[-1:] == (width,)]
    return wide[0] if wide else None


class _Slice:
    """The nodes between a root and the tokens, with bodies as single steps."""

    def __init__(self, bodies: Bodies, root: fx.Node, tokens: fx.Node) -> None:
        self.bodies, self.root, self.tokens = bodies, root, tokens
        self.rows = dict(zip(bodies.results, bodies.rows, strict=True))
        self.count: str = str(value(tokens).shape[0])
        self.nodes = self._between([tokens])

    def search(self) -> Routing | Refuse:
        """The first cut, weight and place of the weight that are proven."""
        failure = Refuse("no expert ids [tokens, k] lead to the experts' rows", self.root)
        for ids in self._candidates(torch.int64):
            for free in [*self._candidates(torch.float32), None]:
                inner = self._closed([self.tokens, ids, *([free] if free else [])])
                if inner is None:
                    continue
                attempt = self._attempt(inner, ids, free)
                if isinstance(attempt, Routing):
                    return attempt
                failure = attempt
        return failure

    def _between(self, inputs: list[fx.Node]) -> list[fx.Node]:
        """Everything above the root, up to the inputs, in order; parameters included."""
        seen: set[fx.Node] = set()
        todo = [self.root]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in inputs:
                todo += [self.rows[node]] if node in self.rows else node.all_input_nodes
        return sorted(seen)

    def _candidates(self, dtype: torch.dtype) -> list[fx.Node]:
        """Values of each token and pick, the nearest to the root first."""
        return [n for n in reversed(self.nodes) if self._is_per_pick(n, dtype)]

    def _is_per_pick(self, node: fx.Node, dtype: torch.dtype) -> bool:
        result = value(node)
        if not isinstance(result, Tensor) or node in (self.root, self.tokens) or node in self.rows:
            return False
        if result.is_floating_point() != dtype.is_floating_point or result.dtype == torch.bool:
            return False
        small = all(isinstance(size, int) for size in result.shape[1:])
        return result.dim() in (1, 2) and str(result.shape[0]) == self.count and small

    def _closed(self, inputs: list[fx.Node]) -> list[fx.Node] | None:
        """The nodes that compute the root from the inputs alone; None if something else flows in.

        Sizes may: they are computed from the shapes.
        """
        inner = [n for n in self._between(inputs) if n not in inputs]
        fixed = [n for n in inner if n.op != "call_function" and not _is_size(n)]
        used = [n for n in fixed if any(u in inner and not _is_size(u) for u in n.users)]
        return None if used or not self._all_used(inner, inputs) else inner

    def _all_used(self, inner: list[fx.Node], inputs: list[fx.Node]) -> bool:
        return all(any(user in inner for user in n.users) or n is self.tokens for n in inputs)

    def _attempt(
        self, inner: list[fx.Node], ids: fx.Node, free: fx.Node | None
    ) -> "Routing | Refuse":
        failure = Refuse("no weights [tokens, k] lead to the result", self.root)
        values = {free, *inner} - {None, *self.bodies.nodes}
        picks, nodes = _per_row(ids), frozenset(inner) | self.bodies.nodes
        widths = {picks, self.bodies.count}
        weights = [n for n in self._candidates(torch.float32) if _per_row(n) in widths]
        weights = [n for n in weights if n in values][:_TRIES]
        for weight, weigh_input in itertools.product(weights, (False, True)):
            full = _per_row(weight) != picks
            routing = Routing(self.root, self.tokens, ids, weight, full, weigh_input, nodes)
            problem = _disproof(routing, inner, free, self.bodies)
            if problem is None:
                return routing
            failure = Refuse(problem, self.root)
        return failure


def _per_row(node: fx.Node) -> int:
    """How many values a row has."""
    return value(node).shape[1:].numel()


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int)) or (
        node.target is aten.sym_size.int
    )


def _disproof(
    routing: Routing, inner: list[fx.Node], free: fx.Node | None, bodies: Bodies
) -> str | None:
    """Why the nodes are not the canonical op; None where they are."""
    distinct = _are_distinct(routing.ids)
    for tokens, repeats in ((5, False), (2, False), (3, True)):
        if repeats and distinct:
            continue
        try:
            _prove_once(routing, inner, free, bodies, tokens, repeats)
        except Disproved as problem:
            return f"the result is no weighted sum of the picked experts: {problem}"
        except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            return f"what is around the experts cannot be run on its own: {first_line}"
    return None


def _are_distinct(ids: fx.Node) -> bool:
    """Whether a token's picks differ, as top-k's do."""
    source = ids
    while source.target in (aten.to.dtype, aten.reshape.default, aten.clone.default):
        source = source.args[0]  # type: ignore[assignment]
    top = source.args[0] if source.args else None
    selects = isinstance(top, fx.Node) and top.target in (aten.topk.default, aten.sort.default)
    return selects or _per_row(ids) == 1


def _prove_once(
    routing: Routing,
    inner: list[fx.Node],
    free: fx.Node | None,
    bodies: Bodies,
    tokens: int,
    repeats: bool,
) -> None:
    width, out = value(routing.tokens).shape[1], value(bodies.results[0]).shape[-1]
    generator = torch.Generator().manual_seed(tokens)

    def random(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64) + 0.1

    picks = _per_row(routing.ids)
    chance = torch.rand(tokens, bodies.count, generator=generator)
    ids = torch.multinomial(chance, picks, replacement=repeats, generator=generator)
    given = [
        random(tokens, width),
        random(tokens, *value(free).shape[1:]) if free is not None else random(1),
        random(bodies.count, width, 2 * _WIDTH),
        random(bodies.count, _WIDTH, out),
        random(bodies.count, out),
    ]
    if not _has_offset(bodies):
        given.pop()
    before, after = _before(routing, inner, free, bodies), _after(routing, inner, free)
    shaped = ids.reshape(tokens, *value(routing.ids).shape[1:])
    with InFloat64():
        prove(before, after, [shaped.to(value(routing.ids).dtype), *given])


def _has_offset(bodies: Bodies) -> bool:
    """Whether an expert may give something for a row of zeros; if not, zeros may stand for none."""
    if bodies.down_bias is not None or bodies.up_bias:
        return True
    sample = torch.zeros(1, value(next(iter(bodies.activation.graph.nodes))).shape[-1])
    return bool(bodies.activation(sample).abs().max() > 0)


def _gated(rows: Tensor, up: Tensor) -> Tensor:
    """A function of rows that is neither linear nor even, and zero at zero."""
    hidden = rows @ up
    return hidden[..., :_WIDTH] + hidden[..., :_WIDTH] * hidden[..., _WIDTH:]


def _before(
    routing: Routing, inner: list[fx.Node], free: fx.Node | None, bodies: Bodies
) -> Callable[..., Tensor]:
    """The nodes as they stand, with a random function for each body."""
    numbers = {node: i for i, node in enumerate(bodies.results)}

    def run(
        ids: Tensor, x: Tensor, free_value: Tensor, up: Tensor, down: Tensor, *bias: Tensor
    ) -> Tensor:
        def body(number: int, rows: Tensor) -> Tensor:
            result = _gated(rows, up[number]) @ down[number]
            return result + bias[0][number] if bias else result

        env: dict[Any, Any] = {routing.ids: ids, routing.tokens: x, free: free_value}
        sizes = _sizes(routing, len(x))
        calls = [node for node in inner if node.op == "call_function"]
        steps = [node for node in calls if node not in bodies.nodes or node in numbers]
        rows = dict(zip(bodies.results, bodies.rows, strict=True))
        for node in steps:
            env[node] = (
                body(numbers[node], env[rows[node]]) if node in numbers else _step(node, env, sizes)
            )
        return env[routing.root]

    return run


def _after(routing: Routing, inner: list[fx.Node], free: fx.Node | None) -> Callable[..., Tensor]:
    """The canonical op on the same functions."""

    def run(
        ids: Tensor, x: Tensor, free_value: Tensor, up: Tensor, down: Tensor, *bias: Tensor
    ) -> Tensor:
        env: dict[Any, Any] = {routing.ids: ids, routing.tokens: x, free: free_value}
        sizes = _sizes(routing, len(x))
        weights = _value_of(routing.weights, env, sizes)
        picks = ids.reshape(len(x), -1)
        weights = weights.reshape(len(x), -1)
        if routing.full:
            weights = weights.gather(1, picks)

        def activation(hidden: Tensor) -> Tensor:
            return hidden[..., :_WIDTH] + hidden[..., :_WIDTH] * hidden[..., _WIDTH:]

        return experts(
            x,
            picks,
            weights,
            up,
            down,
            activation,
            None,
            bias[0] if bias else None,
            transposed=True,
            weigh_input=routing.weigh_input,
        )

    return run


def _value_of(node: fx.Node, env: dict[Any, Any], sizes: _Sizes) -> Any:
    """A node's value, from those that are known."""
    if node not in env:
        for source in node.all_input_nodes:
            _value_of(source, env, sizes)
        env[node] = _step(node, env, sizes)
    return env[node]


def _step(node: fx.Node, env: dict[Any, Any], sizes: _Sizes) -> Any:
    """Runs one node; a size that nothing known has is computed from the number of tokens."""
    if _is_size(node) and not all(source in env for source in node.all_input_nodes):
        return _size(value(node), sizes)

    def real(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument]
        if isinstance(argument, torch.SymInt):
            return _size(argument, sizes)
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    is_leaf: Callable[[Any], bool] = lambda a: isinstance(a, fx.Node)  # noqa: E731
    args, kwargs = pytree.tree_map(real, (tuple(node.args), dict(node.kwargs)), is_leaf=is_leaf)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _sizes(routing: Routing, tokens: int) -> _Sizes:
    """Values of the symbolic sizes: one of those that count tokens has all, the others are one."""
    count: Any = value(routing.tokens).shape[0]
    *others, last = sorted(count.node.expr.free_symbols, key=str)
    return dict.fromkeys(others, 1) | {last: tokens}


def _size(size: Any, sizes: _Sizes) -> int:
    return size if isinstance(size, int) else int(size.node.expr.xreplace(sizes))

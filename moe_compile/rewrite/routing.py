"""Proves that what surrounds the experts' bodies is a weighted sum over each token's picks.

Tokens reach their experts in many ways: by index lists, masks, sorting, a matrix of weights. None
is matched here. Instead the nodes between the tokens and the result are run as they stand, over a
prime field, with random functions in the place of the bodies, and must give what the canonical op
gives: outputs and gradients, exactly. What is no such sum is disproved.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.capture.tensor_form import expression
from moe_compile.rewrite.choices import choices_of
from moe_compile.rewrite.dispatch_mask import Mask
from moe_compile.rewrite.expert_bodies import Bodies
from moe_compile.rewrite.limits import check_no_limit
from moe_compile.rewrite.normal_form import aten, is_random, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.routing_proof import (
    Cut,
    Form,
    agrees,
    disproof,
    flows_into,
    is_size,
    per_row,
)
from moe_compile.verify.one_thread import one_thread

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
    aten.split_with_sizes.default,
    aten.split.sizes,
    operator.getitem,
}
_ADDS_ROWS = {aten.index_add.default, aten.index_put.default, aten.scatter_add.default}
"""How loops add rows to their result; nothing else that is added to it is added so."""

_TRIES = 8


@dataclass(frozen=True)
class Routing:
    """A proven weighted sum.

    Attributes:
        root: the node that is the sum.
        tokens, ids: [T, H] and [T, K], or [T] for one pick.
        mask: where `ids` are a mask that picks follow from, what is known of it.
        form: the weights, and where they are.
        nodes: what lies between these and the root, bodies included.
    """

    root: fx.Node
    tokens: fx.Node
    ids: fx.Node
    mask: Mask | None
    form: Form
    nodes: frozenset[fx.Node] = field(repr=False)


@one_thread()
def prove_routing(graph: fx.Graph, bodies: Bodies) -> Routing:
    """The weighted sum that a block's bodies are part of.

    Raises:
        Refuse: no node is one; the reason is that of the closest attempt.
    """
    failure = Refuse("the experts' results are never put together", bodies.results[0])
    for root in _roots(graph, bodies):
        for tokens in _token_candidates(bodies.rows, root):
            found = _Slice(bodies, root, tokens).search()
            if isinstance(found, Routing):
                return found
            failure = found
    raise failure


def _roots(graph: fx.Graph, bodies: Bodies) -> Iterator[fx.Node]:
    """The first nodes that depend on every body and look like tokens, sums when they are whole."""
    every = (1 << len(bodies.results)) - 1
    reached = {node: 1 << i for i, node in enumerate(bodies.results)}
    width = value(bodies.results[0]).shape[-1]
    found = 0
    for node in graph.nodes:
        for source in node.all_input_nodes:
            reached[node] = reached.get(node, 0) | reached.get(source, 0)
        is_call = node.op == "call_function" and node not in bodies.nodes
        is_whole = is_call and reached.get(node) == every and not _is_added_to(node)
        if is_whole and _is_rows(value(node), width):
            yield node
            found += 1
            if found == _TRIES:
                return


def _is_added_to(node: fx.Node) -> bool:
    """Whether a loop goes on, over experts without products."""
    if node.target not in _ADDS_ROWS:
        return False
    return any(user.target is node.target and user.args[0] is node for user in node.users)


def depending_on(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that is computed from them."""
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.users
    return found


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
        self.inputs = {step.result: step.reads for step in bodies.steps}
        self.count = expression(value(tokens).shape[0])
        self.nodes = self._between([tokens])
        self.computed = depending_on(bodies.nodes)
        self.weights: list[fx.Node] = []

    def search(self) -> Routing | Refuse:
        """The first cut, weight and place of the weight that are proven."""
        self._check_not_random()
        failure = self._stranger()
        for cut in self._cuts():
            attempt = self._attempt(cut)
            if isinstance(attempt, Routing):
                return attempt
            failure = attempt
        return failure

    def _check_not_random(self) -> None:
        """What is drawn at random on the way to the result has no equal, so nothing is tried."""
        node = next((n for n in self.nodes if n in self.computed and is_random(n)), None)
        if node is not None:
            reason = f"{node.target} on the way to the result draws random numbers"
            raise Refuse(reason, node, remedy="set the experts' dropout to 0")

    def _cuts(self) -> Iterator[Cut]:
        """Every cut, those below the nearest ids or masks first."""
        floats = self._candidates(torch.float32)
        for ids, mask in self._picks():
            closed = {free: self._closed([self.tokens, ids, free]) for free in floats}
            closing = [free for free in floats if closed[free] is not None]
            # What closes a cut by itself is the likeliest to be the weights.
            self.weights = [*closing, *(node for node in floats if node not in closing)]
            cuts = [(free, closed[free]) for free in closing]
            for free, inner in [*cuts, (None, self._closed([self.tokens, ids]))]:
                if inner is not None:
                    yield Cut(self.root, self.tokens, ids, free, inner, self.bodies, mask)

    def _stranger(self) -> Refuse:
        """Why no cut may be closed: a parameter that is not the experts' own, or no ids."""
        known = [*self._candidates(torch.int64), *self._candidates(torch.float32)]
        inner = self._between([self.tokens, *known])
        for node in inner:
            if node.op == "get_attr":
                user = next(user for user in node.users if user in inner)
                reason = f"{node.target} takes part, which is no weight of the two products"
                return Refuse(reason, user)
        return Refuse("no expert ids [tokens, k] lead to the experts' rows", self.root)

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
                todo += self.inputs.get(node, flows_into(node))
        return sorted(seen)

    def _candidates(self, dtype: torch.dtype) -> list[fx.Node]:
        """Values of each token and pick that no expert computed, the nearest to the root first."""
        return [n for n in reversed(self.nodes) if self._is_per_pick(n, dtype)]

    def _picks(self) -> list[tuple[fx.Node, Mask | None]]:
        """What may be ids, or a mask that they follow from, the nearest to the root first."""
        masks = {n: Mask.of(n, self.bodies.count) for n in self.nodes if self._is_of_each_token(n)}
        ids = [(node, None) for node in self._candidates(torch.int64)]
        found = [*ids, *((node, mask) for node, mask in masks.items() if mask is not None)]
        return sorted(found, key=lambda pick: pick[0], reverse=True)

    def _is_of_each_token(self, node: fx.Node) -> bool:
        """Whether it has a row for every token."""
        result = value(node)
        if not isinstance(result, Tensor) or node is self.tokens or node in self.computed:
            return False
        sizes: list[Any] = list(result.shape)
        first = [expression(size) for size in sizes[:1]]
        return first == [self.count] and all(isinstance(s, int) for s in sizes[1:])

    def _is_per_pick(self, node: fx.Node, dtype: torch.dtype) -> bool:
        if not self._is_of_each_token(node) or value(node).dim() > 2:
            return False
        kind: torch.dtype = value(node).dtype
        return kind != torch.bool and kind.is_floating_point == dtype.is_floating_point

    def _closed(self, inputs: list[fx.Node]) -> list[fx.Node] | None:
        """The nodes that compute the root from the inputs alone; None if something else flows in.

        Sizes may: they are computed from the shapes.
        """
        inner = [n for n in self._between(inputs) if n not in inputs]
        fixed = [n for n in inner if n.op != "call_function" and not is_size(n)]
        used = [n for n in fixed if any(u in inner and not is_size(u) for u in n.users)]
        return None if used or not self._all_used(inner, inputs) else inner

    def _all_used(self, inner: list[fx.Node], inputs: list[fx.Node]) -> bool:
        used = {source for n in (*inner, *self.bodies.nodes) for source in n.all_input_nodes}
        return all(node in used or node is self.tokens for node in inputs)

    def _attempt(self, cut: Cut) -> "Routing | Refuse":
        failure = Refuse("the result is no weighted sum of the picked experts", self.root)
        try:
            check_no_limit(cut)
            for form in agrees(cut, self._forms(cut)):
                problem = disproof(cut, form)
                if problem is None:
                    nodes = frozenset(cut.inner) | self.bodies.nodes
                    return Routing(self.root, self.tokens, cut.ids, cut.mask, form, nodes)
                failure = Refuse(problem, self.root)
        except Refuse as refusal:
            return refusal
        return failure

    def _forms(self, cut: Cut) -> Iterator[Form]:
        """What may be the weights, the nearest to the root first, on either side."""
        values = {cut.free, *cut.inner} - {None, *self.bodies.nodes}
        choices = choices_of(cut.ids, self.bodies.count)
        beyond = choices > self.bodies.count
        identities = (True, False) if beyond else (False,)
        picks = per_row(cut.ids) if cut.mask is None else cut.mask.picks
        weights = [n for n in self.weights if n in values]
        for full, width in ((False, picks), (True, choices)):
            near = [n for n in weights if per_row(n) == width][:_TRIES]
            spelled = itertools.product(near, (False, True), identities)
            for weight, weigh_input, identity in spelled:
                yield Form(weight, full, weigh_input, identity, beyond)

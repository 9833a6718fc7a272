"""Patterns of experts whose routing is proven, not matched: any code that is the weighted sum."""

from collections.abc import Iterator
from typing import ClassVar

from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.capture.boundary import enter, exit
from moe_compile.rewrite.expert_bodies import Bodies, Stack, Stacks
from moe_compile.rewrite.matcher import NearMiss, check_escapes
from moe_compile.rewrite.normal_form import is_random, value
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import check_row_wise
from moe_compile.rewrite.routing import Routing, prove_routing
from moe_compile.rewrite.weighted_sum import weighted_sum


class ProvenExperts(Pattern):
    """Experts that a subclass finds by their weights; `before` is one of many spellings.

    All of them mean the same: `after` is the weighted sum.
    """

    kind: ClassVar[str] = "experts"
    exact: ClassVar[bool] = False
    shapes = {"x": (6, 8), "ids": (6, 2), "weights": (6, 2), "up": (4, 8, 8), "down": (4, 8, 8)}
    integers = frozenset({"ids"})
    after = staticmethod(weighted_sum)

    def bodies(self, graph: fx.Graph) -> Iterator[Bodies | Refuse]:
        """What the experts of each block compute."""
        raise NotImplementedError

    def find(self, graph: fx.Graph, miss: NearMiss) -> Iterator[Match]:
        """The blocks that are proven; why others are not is noted in `miss`."""
        for block in self.bodies(graph):
            try:
                match = self._proven(graph, block)
            except Refuse as found:
                refusal = _drawn(graph) or found
                miss.offer(1, 2, refusal.node or "", refusal.reason, remedy=refusal.remedy)
                continue
            yield match

    def _proven(self, graph: fx.Graph, block: Bodies | Refuse) -> Match:
        if isinstance(block, Refuse):
            raise block
        check_row_wise(block.activation)
        if block.norm is not None:
            check_row_wise(block.norm, "the experts' norm")
        match = self._match(block, prove_routing(graph, block))
        check_escapes(match)
        return match

    def _match(self, block: Bodies, routing: Routing) -> Match:
        transposed = block.down.transposed
        bindings = {
            "x": routing.tokens,
            "ids": routing.ids if routing.mask is None else routing.mask,
            "weights": routing.form.weights,
            "up": Stacks(block.up, transposed),
            "down": Stacks((block.down,), transposed),
            "activation": block.activation,
            "up_bias": Stacks(block.up_bias, False) if block.up_bias else None,
            "down_bias": _stored(block.down_bias),
            "norm": block.norm,
            "norm_weight": _stored(block.norm_weight),
        }
        choice = {
            "transposed": transposed,
            "weigh_input": routing.form.weigh_input,
            "full": routing.form.full,
            "identity": routing.form.identity,
            "beyond": routing.form.beyond,
        }
        nodes = _not_needed_elsewhere(routing, block)
        return Match(self, bindings, choice, routing.root, nodes)


def _drawn(graph: fx.Graph) -> Refuse | None:
    """Random numbers for as many rows as some expert got; they are why nothing else fits."""
    drawn = (n for n in graph.nodes if is_random(n) and free_unbacked_symbols(value(n)))
    node = next(drawn, None)
    if node is None:
        return None
    reason = f"{node.target} of an expert's rows draws random numbers"
    return Refuse(reason, node, remedy="set the experts' dropout to 0")


def _stored(vectors: Stack | fx.Node | None) -> Stacks | fx.Node | None:
    """A vector of each expert, or the one of all."""
    return Stacks((vectors,), False) if isinstance(vectors, Stack) else vectors


def _not_needed_elsewhere(routing: Routing, block: Bodies) -> frozenset[fx.Node]:
    """The nodes that go; what somebody else reads, such as a mask of picks, stays."""
    nodes = {n for n in routing.nodes if n.op == "call_function" and n.meta["calls"]}
    nodes |= _only_returned(nodes - {routing.root})
    while True:
        kept = {
            node
            for node in nodes - block.nodes - {routing.root}
            if any(user not in nodes and user.target not in (enter, exit) for user in node.users)
        }
        if not kept:
            return frozenset(nodes)
        nodes -= kept


def _only_returned(nodes: set[fx.Node]) -> set[fx.Node]:
    """What is computed from the nodes for the result of a module alone."""
    users = {user for node in nodes for user in node.users if user.op == "call_function"} - nodes
    return {n for n in users if n.users and all(user.target is exit for user in n.users)}

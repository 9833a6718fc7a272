"""Let the tokens travel to the experts: dispatch, each rank's own experts, combine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile import ops
from moe_compile.parallel.experts import own_experts, own_weights, scale_gradient
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.passes.facts import (
    DISPATCH_WHOLE,
    EXPERTS_PLACED,
    LOWERED,
    NORMALIZED,
    PLANNED,
)
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.rewrite.writing import ARRIVALS, Writer, received


@dataclass(frozen=True)
class DispatchExperts(Pass):
    """In: raised experts. Out: each rank computes its own; on one EP rank nothing changes."""

    name = "dispatch_experts"
    needs = frozenset({NORMALIZED})
    gives = frozenset({EXPERTS_PLACED, DISPATCH_WHOLE})
    breaks = frozenset({PLANNED, LOWERED})

    def run(self, unit: UnitGraph) -> int:
        """Returns how many blocks of experts were spread over ranks.

        Raises:
            ValueError: the number of ranks does not divide the number of experts.
        """
        nodes = [n for n in unit.graph.nodes if n.target is ops.experts]
        for node in nodes:
            node.meta["placed"] = True
            if unit.ep is not None:
                _Placing(node, unit.ep, self.name).run()
        return 0 if unit.ep is None else len(nodes)


class _Placing:
    """Writes the nodes around one experts node."""

    def __init__(self, node: fx.Node, ep: ExpertParallel, name: str) -> None:
        self.node, self.ep = node, ep
        self.writer = Writer.beside(node, name)

    def run(self) -> None:
        arguments: dict[str, Any] = ops.experts.arguments(*self.node.args, **self.node.kwargs)
        weights, up = own_weights(arguments), arguments["up"]
        count: int = up.meta["val"].shape[0]
        _check_division(count, self.ep.size, up)
        with self.node.graph.inserting_before(self.node):
            if all(weight.op == "get_attr" for weight in weights.values()):
                back = self._of_shards(arguments, count)
            else:
                arguments |= {name: self._own(weight) for name, weight in weights.items()}
                _, back = self._journey(arguments, count)
        self.node.replace_all_uses_with(back)
        self.node.graph.erase_node(self.node)

    def _of_shards(self, arguments: dict[str, Any], count: int) -> fx.Node:
        """The result where each rank keeps its own experts: see `parallel.experts`."""
        ranks = self.ep.data_ranks
        arguments |= {name: self._scaled(arguments[name], ranks) for name in ("x", "weights")}
        experts, back = self._journey(arguments, count)
        experts.meta["data_ranks"] = ranks
        return self._scaled(back, 1 / ranks)

    def _journey(self, arguments: dict[str, Any], count: int) -> tuple[fx.Node, fx.Node]:
        """The experts of what arrives, and what comes back."""
        tokens = x, _, _ = [arguments[name] for name in ("x", "ids", "weights")]
        given = (*tokens, count, self.ep.group, self.ep.max_tokens)
        arrived = received(*(node.meta["val"] for node in tokens))
        sent = self.writer.add(ops.dispatch, given, arrived)
        arguments = arguments | {n: self.writer.item(sent, i) for i, n in enumerate(ARRIVALS)}
        handle = self.writer.item(sent, len(ARRIVALS))
        size = self.writer.add(torch.ops.aten.sym_size.int, (x, 0), x.meta["val"].shape[0])
        out = self.node.meta["val"]
        computed = out.new_empty(arrived[0].shape[0], *out.shape[1:])
        experts = self.writer.add(ops.experts, (), computed, arguments)
        back = self.writer.add(ops.combine, (experts, handle, size, self.ep.group), out)
        return experts, back

    def _scaled(self, node: fx.Node, factor: float) -> fx.Node:
        return self.writer.add(scale_gradient, (node, factor), node.meta["val"])

    def _own(self, weight: fx.Node) -> fx.Node:
        """This rank's experts, of weights that the graph puts together from several parameters.

        FSDP2 gathers those for the layer, and averages what each rank's own experts got.
        """
        full = weight.meta["val"]
        own = full[: full.shape[0] // self.ep.size]
        return self.writer.add(own_experts, (weight, self.ep.group), own)


def _check_division(count: int, ranks: int, weight: fx.Node) -> None:
    if count % ranks:
        divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"the mesh got {ranks} ranks for ep, and {weight.target} has {count} experts; ep takes "
            f"a divisor of the number of experts: {', '.join(divisors)}"
        )

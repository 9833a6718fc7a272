"""Turn every planned canonical op into its provider's implementation."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.experts import on_own_experts
from moe_compile.passes.facts import LOWERED, PLANNED
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph, copy_graph


@dataclass(frozen=True)
class Lower(Pass):
    """In: a planned graph. Out: no canonical op is left."""

    name = "lower"
    needs = frozenset({PLANNED})
    gives = frozenset({LOWERED})

    def run(self, unit: UnitGraph) -> int:
        """Returns how many ops were lowered."""
        if unit.raised is None:
            unit.raised = copy_graph(unit.graph)
        nodes = [node for node in unit.graph.nodes if isinstance(node.target, CanonicalOp)]
        for node in nodes:
            node.meta["op"] = node.target
            node.target = _implementation(node)
        return len(nodes)


def _implementation(node: fx.Node) -> Any:
    """What the plan says; experts that were dispatched take each rank's shards of the weights."""
    implementation = node.meta["implementation"]
    if "data_ranks" in node.meta:
        return on_own_experts(implementation, node.meta["data_ranks"])
    return implementation

"""Turn every planned canonical op into its provider's implementation."""

from dataclasses import dataclass

from moe_compile.ops.canonical import CanonicalOp
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
        unit.raised = copy_graph(unit.graph)
        nodes = [node for node in unit.graph.nodes if isinstance(node.target, CanonicalOp)]
        for node in nodes:
            node.meta["op"] = node.target
            node.target = node.meta["implementation"]
        return len(nodes)

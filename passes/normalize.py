"""Give every operation its one spelling."""

from dataclasses import dataclass

from moe_compile.passes.facts import NORMALIZED
from moe_compile.rewrite import normal_form
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph, copy_graph


@dataclass(frozen=True)
class Normalize(Pass):
    """In: a captured graph. Out: the same values, in normal form."""

    name = "normalize"
    gives = frozenset({NORMALIZED})

    def run(self, unit: UnitGraph) -> int:
        """Returns how many nodes were respelled or removed."""
        changed = normal_form.normalize(unit.graph)
        unit.captured = copy_graph(unit.graph)
        return changed

"""Make one op of a norm and the rotary embedding that follows, where there is a kernel for both."""

from dataclasses import dataclass

from moe_compile import ops
from moe_compile.passes.facts import LOWERED, NORMALIZED, NORMED_ROTARY_FUSED, PLANNED
from moe_compile.patterns import NormedRotary
from moe_compile.providers.provider import Call
from moe_compile.providers.registry import takers
from moe_compile.rewrite.normal_form import normalize
from moe_compile.rewrite.pattern import Match
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.rewriter import apply
from moe_compile.rewrite.unit_graph import UnitGraph


@dataclass(frozen=True)
class FuseNormedRotary(Pass):
    """In: raised norms and rotary. Out: what stays two ops has no kernel, or has users between.

    So have those for one of which a provider was asked for.
    """

    name = "fuse_normed_rotary"
    needs = frozenset({NORMALIZED})
    gives = frozenset({NORMED_ROTARY_FUSED})
    breaks = frozenset({PLANNED, LOWERED})

    def run(self, unit: UnitGraph) -> int:
        """Returns how many pairs are now one op."""
        asked = {ops.rms_norm.name, ops.rotary.name} & unit.wanted_providers.keys()
        found = (
            [] if asked else [m for m in NormedRotary().find(unit.graph) if _has_kernel(m, unit)]
        )
        for match in found:
            apply(match, self.name)
        if found:
            normalize(unit.graph)
        for node in unit.graph.nodes:
            if node.target is ops.rotary:
                node.meta["stays"] = True
        return len(found)


def _has_kernel(match: Match, unit: UnitGraph) -> bool:
    """Whether a provider takes the call that the match would become."""
    given = {name: match.value(name) for name in match.bindings}
    if match.choice["swapped"]:
        given["x"] = given["x"].transpose(1, 2)
    taking, _ = takers(ops.normed_rotary, Call((), given, unit.mode.autocast))
    return bool(taking)

"""Choose who implements each canonical op. Read-only but for notes on the nodes."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.ops.canonical import CanonicalOp
from moe_compile.passes.facts import NORMALIZED, PLANNED
from moe_compile.providers.provider import Call
from moe_compile.providers.registry import choose
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph


@dataclass(frozen=True)
class ChooseProviders(Pass):
    """In: any graph. Out: every canonical op carries its provider and implementation."""

    name = "choose_providers"
    needs = frozenset({NORMALIZED})
    gives = frozenset({PLANNED})

    def run(self, unit: UnitGraph) -> int:
        """Returns how many ops were planned."""
        nodes = [node for node in unit.graph.nodes if isinstance(node.target, CanonicalOp)]
        for node in nodes:
            op: CanonicalOp[..., Any] = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            call = Call(args, kwargs, unit.mode.autocast)
            node.meta |= _plan(op, call, unit.wanted_providers.get(op.name))
        return len(nodes)


def _plan(op: CanonicalOp[..., Any], call: Call, wanted: str | None) -> dict[str, Any]:
    """The notes for one node. What no provider takes is inlined from the reference."""
    try:
        provider, _ = choose(op, call, wanted)
    except Refuse:
        return {"provider": "reference", "implementation": op.reference, "keeps": None}
    implementation = provider.implementation(op)
    return {
        "provider": provider.name,
        "implementation": implementation,
        "keeps": provider.keeps(op),
    }

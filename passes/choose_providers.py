"""Choose who implements each canonical op. Read-only but for notes on the nodes."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile import ops
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.passes.facts import NORMALIZED, PLANNED
from moe_compile.providers.provider import Call, Provider
from moe_compile.providers.registry import choose, choose_dispatcher
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
            call = Call(args, kwargs, unit.mode.autocast, unit.ep)
            node.meta |= _plan(op, call, _wanted(node, unit))
        return len(nodes)


def _wanted(node: fx.Node, unit: UnitGraph) -> str | None:
    """What the user asked for; but who sent the tokens must bring them back."""
    if node.target is not ops.combine:
        return unit.wanted_providers.get(node.target.name)  # type: ignore[union-attr]
    handle: Any = node.args[1]
    return handle.args[0].meta["provider"]


def _plan(op: CanonicalOp[..., Any], call: Call, wanted: str | None) -> dict[str, Any]:
    """The notes for one node. What no provider takes is inlined from the reference."""
    if op is ops.dispatch:
        provider, instead_of = choose_dispatcher(call, wanted)
        return _notes(op, provider) | {"instead_of": instead_of}
    try:
        provider, _ = choose(op, call, wanted)
    except Refuse as refusal:
        assert op is not ops.combine, "who takes a dispatch takes its combine"
        if wanted is not None:
            raise ValueError(
                f"OptimizeConfig.providers got {wanted!r} for {op.name!r}, which refuses a call: "
                f"{refusal.reason}; it takes a provider that takes every call; leave the op out "
                "to have its provider chosen"
            ) from None
        return {"provider": "reference", "implementation": op.reference, "keeps": None}
    return _notes(op, provider)


def _notes(op: CanonicalOp[..., Any], provider: Provider) -> dict[str, Any]:
    return {
        "provider": provider.name,
        "implementation": provider.implementation(op),
        "keeps": provider.keeps(op),
    }

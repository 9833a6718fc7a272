"""Choose who implements each canonical op. Read-only but for notes on the nodes."""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moe_compile import ops
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.experts import own_weights
from moe_compile.passes.facts import NORMALIZED, PLANNED
from moe_compile.providers.provider import Call, Provider
from moe_compile.providers.registry import choose, choose_dispatcher, takers
from moe_compile.report import Choice
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.timing import Contests, Timing


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
            wanted = _wanted(node, unit)
            if wanted is None and op not in ops.SENDS:
                node.meta |= _fastest(op, call, unit.contests, "data_ranks" in node.meta)
            else:
                node.meta |= _plan(op, call, wanted)
        return len(nodes)


def _wanted(node: fx.Node, unit: UnitGraph) -> str | None:
    """What the user asked for; but who sent the tokens must bring them back."""
    if node.target in ops.SENDS:
        return unit.wanted_providers.get(ops.dispatch.name)
    if node.target not in ops.JOURNEYS:
        return unit.wanted_providers.get(node.target.name)  # type: ignore[union-attr]
    sent: Any = node.args[0]  # a flight, or the results whose handle is beside them
    if node.target in (ops.combine, ops.start_combine):
        sent = node.args[1].args[0]  # type: ignore[union-attr]
    return sent.meta["provider"]


def _plan(op: CanonicalOp[..., Any], call: Call, wanted: str | None) -> dict[str, Any]:
    """The notes for a node whose provider is asked for, or dispatches."""
    if op in ops.SENDS:
        provider, instead_of = choose_dispatcher(op, call, wanted)
        return _notes(op, provider) | {"instead_of": instead_of}
    try:
        provider, _ = choose(op, call, wanted)
    except Refuse as refusal:
        assert op not in ops.JOURNEYS, "who takes a dispatch takes its combine"
        raise ValueError(
            f"OptimizeConfig.providers got {wanted!r} for {op.name!r}, which refuses a call: "
            f"{refusal.reason}; it takes a provider that takes every call; leave the op out "
            "to have its provider chosen"
        ) from None
    return _notes(op, provider)


def _fastest(
    op: CanonicalOp[..., Any], call: Call, contests: Contests | None, shared: bool
) -> dict[str, Any]:
    """The notes for a node that any provider may compute. What none takes is the reference's.

    `shared`: each rank has its own part of the experts that the graph has whole.
    """
    taking, left_out = takers(op, call)
    if not taking:
        return {"provider": "reference", "implementation": op.reference, "keeps": None}
    timing = Timing()
    if contests is not None and len(taking) > 1:
        timing = contests.decide(op, _own_share(op, call) if shared else call, taking)
    provider = timing.first(taking)
    notes = _notes(op, provider)
    if timing == Timing() and not left_out:
        return notes
    left_out |= timing.failures
    numbers = dict(timing.milliseconds)
    choice = Choice(op.name, provider.name, timing.call, numbers, left_out, timing.reason)
    return notes | {"choice": choice}


def _own_share(op: CanonicalOp[..., Any], call: Call) -> Call:
    """The call with as many experts as one rank has."""
    assert call.ep is not None
    arguments, size = call.arguments(op), call.ep.size
    own = {n: w[: w.shape[0] // size] for n, w in own_weights(arguments).items()}
    return replace(call, args=(), kwargs=arguments | own)


def _notes(op: CanonicalOp[..., Any], provider: Provider) -> dict[str, Any]:
    return {
        "provider": provider.name,
        "implementation": provider.implementation(op),
        "keeps": provider.keeps(op),
    }

"""Raise experts to their canonical op."""

from dataclasses import dataclass

from moe_compile.passes.facts import EXPERTS_PLACED, EXPERTS_RAISED, LOWERED, NORMALIZED, PLANNED
from moe_compile.patterns import (
    BatchedExperts,
    ExpertLoop,
    GatheredExperts,
    GroupedExperts,
    SortedExperts,
)
from moe_compile.rewrite.raising import RaisePass


@dataclass(frozen=True)
class RaiseExperts(RaisePass):
    """In: a normal graph. Out: no known spelling of experts is left."""

    name = "raise_experts"
    needs = frozenset({NORMALIZED})
    gives = frozenset({EXPERTS_RAISED})
    breaks = frozenset({EXPERTS_PLACED, PLANNED, LOWERED})
    patterns = (
        GroupedExperts(),
        SortedExperts(),
        BatchedExperts(),
        GatheredExperts(),
        ExpertLoop(),
    )

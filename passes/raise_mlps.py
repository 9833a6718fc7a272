"""Raise gated feed-forward blocks to their canonical op."""

from dataclasses import dataclass

from moe_compile.passes.facts import LOWERED, MLPS_RAISED, NORMALIZED, PLANNED
from moe_compile.patterns import GatedMLP
from moe_compile.rewrite.raising import RaisePass


@dataclass(frozen=True)
class RaiseMLPs(RaisePass):
    """In: a normal graph. Out: no known spelling of gated feed-forward blocks is left."""

    name = "raise_mlps"
    needs = frozenset({NORMALIZED})
    gives = frozenset({MLPS_RAISED})
    breaks = frozenset({PLANNED, LOWERED})
    patterns = (GatedMLP(),)

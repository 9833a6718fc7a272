"""Raise rotary embeddings to their canonical op."""

from dataclasses import dataclass

from moe_compile.passes.facts import LOWERED, NORMALIZED, PLANNED, ROTARY_RAISED
from moe_compile.patterns import RotaryHalf, RotarySplit
from moe_compile.rewrite.raising import RaisePass


@dataclass(frozen=True)
class RaiseRotary(RaisePass):
    """In: a normal graph. Out: no known spelling of rotary embeddings is left."""

    name = "raise_rotary"
    needs = frozenset({NORMALIZED})
    gives = frozenset({ROTARY_RAISED})
    breaks = frozenset({PLANNED, LOWERED})
    patterns = (RotaryHalf(), RotarySplit())

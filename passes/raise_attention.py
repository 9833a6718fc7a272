"""Raise attention to their canonical op."""

from dataclasses import dataclass

from moe_compile.passes.facts import ATTENTION_RAISED, LOWERED, NORMALIZED, PLANNED
from moe_compile.patterns import EagerAttention, SDPAAttention
from moe_compile.rewrite.raising import RaisePass


@dataclass(frozen=True)
class RaiseAttention(RaisePass):
    """In: a normal graph. Out: no known spelling of attention is left."""

    name = "raise_attention"
    needs = frozenset({NORMALIZED})
    gives = frozenset({ATTENTION_RAISED})
    breaks = frozenset({PLANNED, LOWERED})
    patterns = (SDPAAttention(), EagerAttention())

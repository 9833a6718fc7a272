"""Raise RMSNorm-like normalisations to their canonical op."""

from dataclasses import dataclass

from moe_compile.passes.facts import LOWERED, NORMALIZED, NORMS_RAISED, PLANNED
from moe_compile.patterns import RespelledNorm, RMSNorm
from moe_compile.rewrite.raising import RaisePass


@dataclass(frozen=True)
class RaiseNorms(RaisePass):
    """In: a normal graph. Out: no known spelling of RMSNorm-like normalisations is left."""

    name = "raise_norms"
    needs = frozenset({NORMALIZED})
    gives = frozenset({NORMS_RAISED})
    breaks = frozenset({PLANNED, LOWERED})
    patterns = (RMSNorm(), RespelledNorm())

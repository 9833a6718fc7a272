"""What every raising pass does: find its idioms and replace them by canonical ops."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moe_compile.capture.trace import Mode
from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.matcher import DEFAULT_MODE, NearMiss, find
from moe_compile.rewrite.normal_form import normalize
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.rewrite.rewriter import apply
from moe_compile.rewrite.unit_graph import UnitGraph


@dataclass(frozen=True)
class RaisePass(Pass):
    """Raises the idioms of `patterns`, in their order."""

    patterns: ClassVar[tuple[Pattern, ...]]

    def run(self, unit: UnitGraph) -> int:
        """Replaces every match; keeps the best near miss of each pattern."""
        return sum(self._raise(pattern, unit) for pattern in self.patterns)

    def _raise(self, pattern: Pattern, unit: UnitGraph) -> int:
        miss = unit.near_misses.setdefault(pattern.name, NearMiss.of(pattern))
        raised = 0
        for match in matches(pattern, unit.graph, miss, unit.mode):
            apply(match, self.name)
            raised += 1
        if raised:
            normalize(unit.graph)
        return raised


def matches(
    pattern: Pattern, graph: fx.Graph, miss: NearMiss, mode: Mode = DEFAULT_MODE
) -> Iterator[Match]:
    """The pattern's matches; the caller may rewrite each as it comes."""
    if isinstance(pattern, ProvenExperts):
        miss.stage = "the experts' weights fit, a weighted sum is not proven"
        return pattern.find(graph, miss)
    return find(pattern, graph, miss, mode)


def none_left(name: str, *patterns: Pattern) -> Fact:
    """The fact that none of the patterns matches any more."""

    def holds(graph: fx.Graph) -> bool:
        return not any(match for p in patterns for match in matches(p, graph, NearMiss.of(p)))

    return Fact(name, holds)

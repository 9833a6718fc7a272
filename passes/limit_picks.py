"""Give the experts rows for the picks that were promised, where many more could come."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile import ops
from moe_compile.config import is_count
from moe_compile.parallel.limits import limit_picks, limit_places
from moe_compile.passes.facts import DISPATCH_WHOLE, EXPERTS_PLACED, LOWERED, PLANNED
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.rewrite.writing import Writer


@dataclass(frozen=True)
class LimitPicks(Pass):
    """In: placed experts. Out: those of a rank have rows for `most` picks in one call.

    With `OptimizeConfig.max_tokens_per_rank` there are rows for all picks of all ranks, as many
    times those of even routing as there are ranks. A step in which more than `most` come to a rank
    stops with an error: on a GPU the device does, and with it the process.

    Raises:
        ValueError: for a `most` that is no positive int.
    """

    name = "limit_picks"
    needs = frozenset({EXPERTS_PLACED})
    # Whoever cut a dispatch up would have to share out the limit, too.
    breaks = frozenset({DISPATCH_WHOLE, PLANNED, LOWERED})

    most: int

    def __post_init__(self) -> None:
        if not is_count(self.most):
            raise ValueError(
                f"LimitPicks got most={self.most!r}; it takes a positive int: twice the tokens of "
                "a rank times their picks is twice an even share; leave the pass out for no limit"
            )

    def run(self, unit: UnitGraph) -> int:
        """Returns how many blocks of experts got a limit."""
        found = [n for n in unit.graph.nodes if n.target is ops.experts and n.kwargs.get("places")]
        for node in found:
            self._limit(node, "ids", limit_picks)
            self._limit(node, "places", limit_places)
        return len(found)

    def _limit(self, experts: fx.Node, name: str, limit: Any) -> None:
        given: Any = experts.kwargs[name]
        with experts.graph.inserting_before(experts):
            value = limit(given.meta["val"], self.most)
            limited = Writer.beside(given, self.name).add(limit, (given, self.most), value)
        experts.update_kwarg(name, limited)

"""What the passes work on: one unit's graph, with what has been found in it."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from moe_compile.capture.boundary import Attribute, ModuleCall
from moe_compile.capture.trace import Capture, Mode
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.rewrite.matcher import NearMiss
from moe_compile.timing import Contests


@dataclass
class PassRecord:
    """What one pass did to one graph: changes made, nodes before and after, canonical ops after."""

    name: str
    changed: int
    nodes_before: int
    nodes_after: int
    ops: dict[str, int]
    seconds: float


@dataclass
class UnitGraph:
    """A capture on its way through the pipeline.

    Attributes:
        name: the unit's name in the model; `prefix`: the captured module's name inside the unit, ""
            for the unit itself.
        graph, calls, mode, reads: see `Capture`.
        captured: the graph as it was traced, in normal form; `raised`: as it was before lowering,
            or before the first pass that is not exact. Both are kept for verification.
        ep: the ranks that share the experts, None where each has all of them.
        contests: decides between providers; None for the first that takes a call.
        near_misses: the best failed attempt of every pattern.
        not_overlapped: why nothing runs while a module's tokens travel, by its name.
        not_quantized: why a module's products keep their dtype, by its name.
    """

    name: str
    graph: fx.Graph
    captured: fx.Graph
    calls: list[ModuleCall]
    mode: Mode
    reads: dict[Attribute, Any]
    wanted_providers: dict[str, str] = field(default_factory=dict[str, str])
    prefix: str = ""
    ep: ExpertParallel | None = None
    contests: Contests | None = None
    raised: fx.Graph | None = None
    near_misses: dict[str, NearMiss] = field(default_factory=dict[str, NearMiss])
    not_overlapped: dict[str, str] = field(default_factory=dict[str, str])
    not_quantized: dict[str, str] = field(default_factory=dict[str, str])
    records: list[PassRecord] = field(default_factory=list[PassRecord])

    @classmethod
    def of(
        cls,
        name: str,
        capture: Capture,
        wanted_providers: dict[str, str],
        prefix: str = "",
        ep: ExpertParallel | None = None,
        contests: Contests | None = None,
    ) -> "UnitGraph":
        """A capture before the first pass."""
        graph, calls = copy_graph(capture.graph), capture.calls
        reads, mode = capture.reads, capture.mode
        placed = (wanted_providers, prefix, ep, contests)
        return cls(name, graph, capture.graph, calls, mode, reads, *placed)

    def at(self, name: str, prefix: str) -> "UnitGraph":
        """The same graphs, as those of a module that is alike: what passes change is shared."""
        return replace(self, name=name, prefix=prefix)

    def owner(self, node: fx.Node) -> str:
        """The name, inside the unit, of the module whose call the node lies in."""
        return self.path(node.meta["calls"][-1])

    def innermost(self, node: fx.Node) -> str:
        """The name, inside the unit, of the innermost module that the node lies in."""
        calls = node.meta["calls"]
        return self.path(next(c for c in reversed(calls) if self.calls[c].path is not None))

    def path(self, call: int) -> str:
        """The name, inside the unit, of the module that a call calls."""
        path = self.calls[call].path
        assert path is not None, "nothing is rewritten inside an autograd function"
        return ".".join(filter(None, (self.prefix, path)))

    def owners(self) -> dict[str, int]:
        """The modules that hold lowered ops, each with its first call."""
        found: dict[str, int] = {}
        for node in self.graph.nodes:
            if "op" in node.meta:
                found.setdefault(self.owner(node), node.meta["calls"][-1])
        return found

    def mode_of(self, call: int) -> Mode:
        """What a call was captured for: also the other mode, where no code in it asks for it."""
        path = self.calls[call].path
        asks = any(
            name == "training" and (not path or f"{where}.".startswith(f"{path}."))
            for where, name in self.reads
        )
        return self.mode if asks else replace(self.mode, training=None)

    def parameters(self) -> set[str]:
        """The names, inside the unit, of the parameters that the captured code reads."""
        read = [n for n in self.captured.nodes if n.op == "get_attr" and n.users]
        return {".".join(filter(None, (self.prefix, str(node.target)))) for node in read}

    def ops(self) -> dict[str, int]:
        """How many nodes there are of each canonical op."""
        names = [n.target.name for n in self.graph.nodes if isinstance(n.target, CanonicalOp)]
        return dict(Counter(names))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes, with their notes, in a graph of their own."""
    copy = fx.Graph()
    copy.graph_copy(graph, {})
    return copy

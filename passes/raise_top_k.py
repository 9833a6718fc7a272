"""Raise the routers' top-k to its canonical op, for which there is a kernel."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile import ops
from moe_compile.passes.facts import LOWERED, NORMALIZED, PLANNED
from moe_compile.rewrite.normal_form import aten
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph


@dataclass(frozen=True)
class RaiseTopK(Pass):
    """In: raised experts, whose patterns know torch's top-k. Out: none of a last dimension is left.

    Among equal scores, the kernel may pick others than torch's.
    """

    name = "raise_top_k"
    needs = frozenset({NORMALIZED})
    breaks = frozenset({PLANNED, LOWERED})

    def run(self, unit: UnitGraph) -> int:
        """Returns how many were raised."""
        found = [node for node in unit.graph.nodes if _is_of_last(node)]
        for node in found:
            node.target, node.args, node.kwargs = ops.top_k, tuple(node.args[:2]), {}
            node.meta |= {"made_by": (self.name, "top_k"), "kind": "router"}
            node.meta.setdefault("crosses", frozenset())
        return len(found)


def _is_of_last(node: fx.Node) -> bool:
    """Whether it is the k largest along the last dimension; models ask for no order of others."""
    if node.target is not aten.topk.default:
        return False
    given: Any = dict(zip(("x", "k", "dim", "largest"), node.args, strict=False)) | node.kwargs
    last = given["x"].meta["val"].dim() - 1
    is_last = given.get("dim", -1) in (-1, last)
    return isinstance(given["k"], int) and is_last and given.get("largest", True) is True

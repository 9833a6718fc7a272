"""Nodes that passes write around what patterns found."""

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Writer:
    """Adds nodes at the graph's insert point; each has `meta`, and a fake value of its own."""

    graph: fx.Graph
    meta: dict[str, Any]

    @classmethod
    def beside(cls, node: fx.Node, made_by: str) -> "Writer":
        """One whose nodes belong to the same block of experts as `node`."""
        meta = {k: v for k, v in node.meta.items() if k != "val"}
        return cls(node.graph, meta | {"made_by": (made_by, node.meta["made_by"][1])})

    def add(
        self, target: Any, args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A call whose result has the fake `value`."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = self.meta | {"val": value}
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """A part of a node's result."""
        return self.add(getitem, (node, index), node.meta["val"][index])


ARRIVALS = ("x", "ids", "weights", "places")
"""The arguments of the experts that dispatch returns, in its order; the handle comes after them."""


def received(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Any, ...]:
    """Fake values of what dispatch returns: as many rows as the other ranks have for us."""
    rows, places = unknown_size(x), x.new_empty(unknown_size(x), 0)
    here = (t.new_empty(rows, t.shape[1]) for t in (x, ids, weights))
    return *here, places, [ids.new_empty(rows)]


def unknown_size(like: Any) -> torch.SymInt:
    """A size that depends on data, for a fake tensor's graph."""
    sizes = like.fake_mode.shape_env
    with sizes.ignore_fresh_unbacked_symbols():  # no operator made it
        made: torch.SymInt = sizes.create_unbacked_symint()
    return made

"""Where a layer's picks are counted: beside its experts, if somebody asked for it.

The statement is in every emitted function; as long as the module has no counts it does nothing, and
nothing of it is in a compiled graph.
"""

from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from moe_compile import ops
from moe_compile.install.emit import OWNER
from moe_compile.kernels.add_picks import add_picks
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.chunks import token_chunks
from moe_compile.rewrite.correction_bias import correction_bias
from moe_compile.rewrite.unit_graph import UnitGraph

COUNTS = "_moe_compile_picks"
"""The attribute of a module that holds a tensor of counts for each of its blocks of experts."""


@dataclass(frozen=True)
class Router:
    """A block of experts whose picks can be counted.

    Attributes:
        module: the full name of the module that holds it.
        index: which of the module's blocks it is.
        experts: how many experts it has, over all ranks.
        bias: the full name of what is added to the scores for the choice alone, or None.
    """

    module: str
    index: int
    experts: int
    bias: str | None


def count_picks(owner: nn.Module, ids: Tensor, index: int) -> None:
    """Adds ids [T, K] to the owner's counts, if it has some and is in training."""
    counts: Any = getattr(owner, COUNTS, None)
    if counts is not None and owner.training:
        add_picks(counts[index], ids)


def counted(graph: fx.Graph) -> fx.Graph:
    """A copy of an owner's lowered graph that counts the picks of each block of experts."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for index, block in enumerate(routed(copy)):
        arguments: Any = (OWNER, block.ids, index)
        with copy.inserting_before(block.node):
            copy.call_function(count_picks, arguments)
    return copy


class Block(NamedTuple):
    """A node of a lowered graph that tokens are routed to, with their picks."""

    node: fx.Node
    ids: fx.Node
    weights: fx.Node
    experts: int


def routed(graph: fx.Graph) -> list[Block]:
    """The blocks of experts of a lowered graph, in order.

    Where experts are on several ranks, the nodes are the dispatches: what comes after them has the
    picks of other ranks' tokens. Of tokens in chunks it is the first.
    """
    spread = [n for n in graph.nodes if n.meta.get("op") in ops.SENDS and not n.meta.get("chunk")]
    if spread:
        return [_block(n, n.meta["op"]) for n in spread]
    return [_block(n, ops.experts) for n in graph.nodes if n.meta.get("op") is ops.experts]


def _block(node: fx.Node, op: CanonicalOp[..., Any]) -> Block:
    given = op.arguments(*node.args, **node.kwargs)
    experts = given["num_experts"] if op in ops.SENDS else given["up"].meta["val"].shape[0]
    return Block(node, _whole(given["ids"]), _whole(given["weights"]), experts)


def _whole(node: fx.Node) -> fx.Node:
    """What a chunk was cut from; other nodes as they are."""
    cut = node.args[0] if node.target is getitem else None
    is_chunk = isinstance(cut, fx.Node) and cut.target is token_chunks
    return cut.args[0] if is_chunk else node  # type: ignore[union-attr, return-value]


def routers(unit: UnitGraph, path: str) -> tuple[Router, ...]:
    """Those of one owner in a unit's lowered graph; names are inside the unit."""
    blocks = [block for block in routed(unit.graph) if unit.owner(block.node) == path]
    first = [b for b in blocks if b.node.meta["calls"][-1] == blocks[0].node.meta["calls"][-1]]
    return tuple(
        Router(path, index, block.experts, correction_bias(block.ids, block.weights, block.experts))
        for index, block in enumerate(first)
    )

"""The facts that the built-in passes trade in."""

from torch import fx

from moe_compile.ops import dispatch, experts, rotary, start_dispatch
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.patterns import (
    BatchedExperts,
    EagerAttention,
    ExpertLoop,
    GatedMLP,
    GroupedExperts,
    RespelledNorm,
    RMSNorm,
    RotaryHalf,
    RotarySplit,
    SDPAAttention,
    SortedExperts,
)
from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.normal_form import is_normal
from moe_compile.rewrite.raising import none_left


def _lowered(graph: fx.Graph) -> bool:
    return not any(isinstance(node.target, CanonicalOp) for node in graph.nodes)


def _planned(graph: fx.Graph) -> bool:
    return all(
        "provider" in node.meta for node in graph.nodes if isinstance(node.target, CanonicalOp)
    )


def _placed(graph: fx.Graph) -> bool:
    return all("placed" in node.meta for node in graph.nodes if node.target is experts)


def _whole(graph: fx.Graph) -> bool:
    return not any(node.target is start_dispatch for node in graph.nodes)


def _chunked(graph: fx.Graph) -> bool:
    return not any(node.target is dispatch for node in graph.nodes)


def _fused(graph: fx.Graph) -> bool:
    return all("stays" in node.meta for node in graph.nodes if node.target is rotary)


NORMALIZED = Fact("normalized", is_normal)
NORMS_RAISED = none_left("norms_raised", RMSNorm(), RespelledNorm())
ROTARY_RAISED = none_left("rotary_raised", RotaryHalf(), RotarySplit())
NORMED_ROTARY_FUSED = Fact("normed_rotary_fused", _fused)
ATTENTION_RAISED = none_left("attention_raised", SDPAAttention(), EagerAttention())
MLPS_RAISED = none_left("mlps_raised", GatedMLP())
EXPERTS_RAISED = none_left(
    "experts_raised", GroupedExperts(), SortedExperts(), BatchedExperts(), ExpertLoop()
)
EXPERTS_PLACED = Fact("experts_placed", _placed)
DISPATCH_WHOLE = Fact("dispatch_whole", _whole)
TOKENS_CHUNKED = Fact("tokens_chunked", _chunked)
PLANNED = Fact("planned", _planned)
LOWERED = Fact("lowered", _lowered)

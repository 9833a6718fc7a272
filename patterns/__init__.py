"""The idioms that moe_compile knows, one a file."""

from moe_compile.patterns.batched_experts import BatchedExperts
from moe_compile.patterns.eager_attention import EagerAttention
from moe_compile.patterns.expert_loop import ExpertLoop
from moe_compile.patterns.gated_mlp import GatedMLP
from moe_compile.patterns.gathered_experts import GatheredExperts
from moe_compile.patterns.grouped_experts import GroupedExperts
from moe_compile.patterns.normed_rotary import NormedRotary
from moe_compile.patterns.respelled_norm import RespelledNorm
from moe_compile.patterns.rms_norm import RMSNorm
from moe_compile.patterns.rotary_half import RotaryHalf
from moe_compile.patterns.rotary_split import RotarySplit
from moe_compile.patterns.sdpa_attention import SDPAAttention
from moe_compile.patterns.sorted_experts import SortedExperts

__all__ = [
    "BatchedExperts",
    "EagerAttention",
    "ExpertLoop",
    "GatedMLP",
    "GatheredExperts",
    "GroupedExperts",
    "NormedRotary",
    "RMSNorm",
    "RespelledNorm",
    "RotaryHalf",
    "RotarySplit",
    "SDPAAttention",
    "SortedExperts",
]

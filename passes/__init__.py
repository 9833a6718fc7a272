"""The passes, one a file, and their default order."""

from moe_compile.passes.choose_providers import ChooseProviders
from moe_compile.passes.chunk_tokens import ChunkTokens
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.passes.facts import EXPERTS_PLACED, LOWERED
from moe_compile.passes.fuse_normed_rotary import FuseNormedRotary
from moe_compile.passes.limit_picks import LimitPicks
from moe_compile.passes.lower import Lower
from moe_compile.passes.normalize import Normalize
from moe_compile.passes.overlap_shared_experts import OverlapSharedExperts
from moe_compile.passes.quantize_to_fp8 import QuantizeToFP8
from moe_compile.passes.raise_attention import RaiseAttention
from moe_compile.passes.raise_experts import RaiseExperts
from moe_compile.passes.raise_mlps import RaiseMLPs
from moe_compile.passes.raise_norms import RaiseNorms
from moe_compile.passes.raise_rotary import RaiseRotary
from moe_compile.passes.raise_top_k import RaiseTopK
from moe_compile.rewrite.pipeline import Pipeline

PIPELINE = Pipeline(
    (
        Normalize(),
        RaiseExperts(),
        RaiseNorms(),
        RaiseRotary(),
        RaiseAttention(),
        RaiseMLPs(),
        DispatchExperts(),
        ChooseProviders(),
        Lower(),
    ),
    needs_at_end=frozenset({EXPERTS_PLACED, LOWERED}),
)
"""The default order. It is immutable; `without`, `before`, `after` and `replace` give new ones."""

__all__ = [
    "PIPELINE",
    "ChooseProviders",
    "ChunkTokens",
    "DispatchExperts",
    "FuseNormedRotary",
    "LimitPicks",
    "Lower",
    "Normalize",
    "OverlapSharedExperts",
    "QuantizeToFP8",
    "RaiseAttention",
    "RaiseExperts",
    "RaiseMLPs",
    "RaiseNorms",
    "RaiseRotary",
    "RaiseTopK",
]

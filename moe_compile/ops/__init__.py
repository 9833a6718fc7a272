"""Canonical ops, one a file: what patterns raise to and providers lower from."""

from moe_compile.ops.attention import attention
from moe_compile.ops.canonical import OPS, CanonicalOp, canonical
from moe_compile.ops.combine import combine
from moe_compile.ops.dispatch import dispatch
from moe_compile.ops.experts import experts
from moe_compile.ops.gated_mlp import gated_mlp
from moe_compile.ops.linear_cross_entropy import linear_cross_entropy
from moe_compile.ops.rms_norm import rms_norm
from moe_compile.ops.rotary import rotary

__all__ = [
    "OPS",
    "CanonicalOp",
    "attention",
    "canonical",
    "combine",
    "dispatch",
    "experts",
    "gated_mlp",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
]

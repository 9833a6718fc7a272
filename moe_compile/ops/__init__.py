"""Canonical ops, one a file: what patterns raise to and providers lower from."""

from moe_compile.ops.attention import attention
from moe_compile.ops.canonical import OPS, CanonicalOp, canonical
from moe_compile.ops.combine import combine
from moe_compile.ops.dispatch import dispatch
from moe_compile.ops.experts import experts
from moe_compile.ops.fp8_linear import fp8_linear
from moe_compile.ops.gated_mlp import gated_mlp
from moe_compile.ops.linear_cross_entropy import linear_cross_entropy
from moe_compile.ops.normed_rotary import normed_rotary
from moe_compile.ops.rms_norm import rms_norm
from moe_compile.ops.rotary import rotary
from moe_compile.ops.start_combine import start_combine
from moe_compile.ops.start_dispatch import start_dispatch
from moe_compile.ops.top_k import top_k
from moe_compile.ops.wait_combine import wait_combine
from moe_compile.ops.wait_dispatch import wait_dispatch

SENDS = (dispatch, start_dispatch)
"""The ops with which tokens leave a rank."""

JOURNEYS = (*SENDS, wait_dispatch, combine, start_combine, wait_combine)
"""The ops that all ranks of a group must call together."""

__all__ = [
    "JOURNEYS",
    "OPS",
    "SENDS",
    "CanonicalOp",
    "attention",
    "canonical",
    "combine",
    "dispatch",
    "experts",
    "fp8_linear",
    "gated_mlp",
    "linear_cross_entropy",
    "normed_rotary",
    "rms_norm",
    "rotary",
    "start_combine",
    "start_dispatch",
    "top_k",
    "wait_combine",
    "wait_dispatch",
]

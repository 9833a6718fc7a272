"""TransformerEngine's quantisers and its product, as plain torch: for tests of what calls them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_compile.ops.fp8 import E4M3, E5M2, Block, rounded

DType = SimpleNamespace(kFloat8E4M3=E4M3, kFloat8E5M2=E5M2)


@dataclass
class Quantized:
    """A matrix, and its transpose, each rounded along its own rows."""

    rowwise: Tensor
    columnwise: Tensor


@dataclass
class _Quantizer:
    dtype: torch.dtype
    block: Block
    internal: bool = False

    def __call__(self, x: Tensor) -> Quantized:
        assert x.is_contiguous()
        assert self.internal
        lasts = x.shape[0] % 16, x.shape[1] % 16
        assert lasts == (0, 0)
        return Quantized(*(rounded(t, self.dtype, self.block) for t in (x, x.mT)))


def Float8CurrentScalingQuantizer(
    dtype: torch.dtype, device: Any, *, rowwise: bool, columnwise: bool
) -> _Quantizer:
    assert rowwise
    assert columnwise
    return _Quantizer(dtype, (None, None))


def Float8BlockQuantizer(
    dtype: torch.dtype,
    *,
    rowwise: bool,
    columnwise: bool,
    block_scaling_dim: int,
    force_pow_2_scales: bool,
) -> _Quantizer:
    assert rowwise
    assert columnwise
    assert not force_pow_2_scales
    return _Quantizer(dtype, (128 if block_scaling_dim == 2 else 1, 128))


def gemm(
    a: Quantized, b: Quantized, *, layout: str, use_split_accumulator: bool, grad: bool = False
) -> Tensor:
    """b @ a.T, whose letters say which of them is given transposed: N is a, T is b."""
    left = b.columnwise if layout[1] == "T" else b.rowwise
    right = a.rowwise if layout[0] == "T" else a.columnwise
    return (left @ right.mT).bfloat16()

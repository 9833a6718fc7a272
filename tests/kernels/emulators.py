"""Packages for a GPU, as plain torch with the same functions: for tests of what calls them."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows and one over their root mean square, in float32."""
    wide = x.float()
    return wide, torch.rsqrt(wide.pow(2).mean(-1) + eps)


def norm_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, offset: float
) -> tuple[Tensor, Tensor | None]:
    rows = x.float() * scale[:, None]
    weighed = grad.float() if weight is None else grad.float() * (offset + weight.float())
    of_x = scale[:, None] * (weighed - rows * (rows * weighed).mean(-1, keepdim=True))
    of_weight = None if weight is None else (grad.float() * rows).sum(0).to(weight.dtype)
    return of_x.to(x.dtype), of_weight


class LigerNorm:
    """`liger_kernel.ops.rms_norm`; its numbers for roundings are 0 and 1."""

    @staticmethod
    def calculate_settings(width: int) -> tuple[int, int]:
        return width, 4

    @staticmethod
    def rms_norm_forward(
        x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: int, row_mode: None
    ) -> tuple[Any, ...]:
        rows = x.view(-1, x.shape[-1])
        wide, scale = normalised(rows, eps)
        y = wide * scale[:, None]
        y = y.to(x.dtype) if casting == 0 else y
        if weight is not None:
            y = y * (offset + (weight if casting == 0 else weight.float()))
        return y.to(x.dtype).view(x.shape), rows, scale, *LigerNorm.calculate_settings(1), casting

    @staticmethod
    def rms_norm_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        offset: float,
        casting: int,
        block: int,
        warps: int,
        in_place: bool,
        row_mode: None,
    ) -> tuple[Tensor, Tensor | None]:
        assert not in_place
        assert block == x.shape[1]
        of_x, of_weight = norm_gradients(grad.view(x.shape), x, scale, weight, offset)
        return of_x.view(grad.shape), of_weight


class LigerSwiGLU:
    """`liger_kernel.ops.swiglu`, whose backward overwrites what it was given."""

    @staticmethod
    def swiglu_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert gate.is_contiguous()
        assert up.is_contiguous()
        return gate, up, torch.nn.functional.silu(gate.float()).to(gate.dtype) * up

    @staticmethod
    def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        wide = gate.float()
        sigmoid = wide.sigmoid()
        of_gate = grad.float() * (wide * sigmoid * (1 - sigmoid) + sigmoid) * up.float()
        up.copy_(grad.float() * wide * sigmoid)
        return gate.copy_(of_gate), up


def liger(name: str) -> Any:
    return {"rms_norm": LigerNorm, "swiglu": LigerSwiGLU}[name]


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: None,
    quantizer: None,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    assert x.dim() == 2
    wide, scale = normalised(x, eps)
    y = wide * scale[:, None] * (int(zero_centered) + weight.float())
    return y.to(x.dtype), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor | None]:
    return norm_gradients(grad, x, scale, weight, float(zero_centered))


TRANSFORMER_ENGINE = SimpleNamespace(rmsnorm_fwd=rmsnorm_fwd, rmsnorm_bwd=rmsnorm_bwd)
"""`transformer_engine_torch`."""


def quack_gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    c: None,
    semaphore: None,
    tile_rows: int,
    tile_columns: int,
    cluster_rows: int,
    cluster_columns: int,
    *,
    pingpong: bool,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
) -> None:
    """`quack.gemm.gemm` of groups, with the demands of its kernels."""
    assert not pingpong or tile_columns <= 208
    assert A_idx is None or (A_idx.dtype == torch.int32 and cluster_columns == 1)
    ends = cu_seqlens_k if cu_seqlens_m is None else cu_seqlens_m
    assert ends is not None
    assert ends.dtype == torch.int32
    of_rows = cu_seqlens_m is not None
    assert a.stride(-1 if of_rows else -2) == 1
    assert out.stride(-1) == 1 if of_rows else b.stride(-2) == 1
    rows = a if of_rows else a.T
    rows = rows if A_idx is None else rows[A_idx.long()]
    for group, (start, end) in enumerate(pairwise(ends.tolist())):
        if of_rows:
            out[start:end] = rows[start:end] @ b[group].T
        else:
            out[group] = rows[start:end].T @ b.T[start:end]


QUACK = SimpleNamespace(gemm=quack_gemm)
"""`quack.gemm`."""

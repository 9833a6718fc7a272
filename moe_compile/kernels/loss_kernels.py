"""The Triton kernels of `linear_cross_entropy`; imported where there is a GPU."""

# Triton has no types, and is not there without CUDA.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOptionalOperand=false
import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 32768
"""Columns of a row that are read at a time, which are enough reads under way for the memory."""

_WARPS = 32


@triton.jit
def _to_gradient(
    logits,
    labels,
    scale,
    losses,
    ignore_index,
    width: tl.constexpr,
    size: tl.constexpr,
    log2e: tl.constexpr,
):
    """The scaled loss of a row; its logits become its gradient; NaN for a label out of range."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    factor = tl.load(scale)
    if label == ignore_index:
        for start in range(0, width, size):
            columns = start + tl.arange(0, size)
            zeros = tl.zeros([size], logits.dtype.element_ty)
            tl.store(logits + columns, zeros, mask=columns < width)
        tl.store(losses + row, 0.0)
    else:
        in_range = (label >= 0) & (label < width)
        factor = tl.where(in_range, factor, float("nan"))
        own = tl.load(logits + label, mask=in_range, other=0).to(tl.float32)
        largest = -float("inf")
        total = 0.0
        for start in range(0, width, size):
            columns = start + tl.arange(0, size)
            values = tl.load(logits + columns, mask=columns < width, other=-float("inf"))
            values = values.to(tl.float32) * log2e
            larger = tl.maximum(largest, tl.max(values, axis=0))
            total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(values - larger), axis=0)
            largest = larger
        log_sum = largest + tl.log2(total)
        tl.store(losses + row, (log_sum / log2e - own) * factor)
        # Backwards, as what was read last is what the cache still has; nothing is read again.
        chunks: tl.constexpr = (width + size - 1) // size
        for chunk in range(chunks):
            columns = (chunks - 1 - chunk) * size + tl.arange(0, size)
            inside = columns < width
            values = tl.load(logits + columns, mask=inside, other=0, eviction_policy="evict_first")
            grad = tl.exp2(values.to(tl.float32) * log2e - log_sum)
            grad = (grad - tl.where(columns == label, 1.0, 0.0)) * factor
            tl.store(logits + columns, grad, mask=inside, eviction_policy="evict_first")


def to_gradient(logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    """The scaled sum of the losses of logits [T, V]; the logits become its gradient, in place."""
    rows, width = logits.shape
    losses = scale.new_empty(rows)
    log2e = 1.4426950408889634
    _to_gradient[(rows,)](
        logits, labels, scale, losses, ignore_index, width, _COLUMNS, log2e, num_warps=_WARPS
    )
    return losses.sum()


@triton.jit
def _scale(values, factor, count, size: tl.constexpr):
    """values *= factor, without reading them where the factor is one."""
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
        scaled = tl.load(values + at, mask=at < count).to(tl.float32) * by
        tl.store(values + at, scaled, mask=at < count)


def scale(values: Tensor, factor: Tensor) -> None:
    """Multiply in place; next to nothing where the factor is one, as it mostly is."""
    size = 4096
    if values.numel():
        _scale[(triton.cdiv(values.numel(), size),)](values, factor, values.numel(), size)
    torch.autograd.graph.increment_version(values)

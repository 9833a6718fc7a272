"""What our own operators mean, for the oracle."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_compile.kernels import grouped_mm as _register_ops  # noqa: F401  # pyright: ignore
from moe_compile.kernels.expert_rows import collect_meaning, spread_meaning
from moe_compile.verify.oracle import INTERPRETERS


def _groups(offs: Tensor) -> Iterator[slice]:
    """The rows of each group."""
    for start, end in itertools.pairwise([0, *offs.tolist()]):
        yield slice(start, end)


def _grouped_mm(x: Tensor, w: Tensor, offs: Tensor, transposed: bool = False) -> Tensor:
    w = w.mT if transposed else w
    products = [x[rows] @ w[group] for group, rows in enumerate(_groups(offs))]
    beyond = x.shape[0] - int(offs[-1])
    return torch.cat([*products, x.new_zeros(beyond, w.shape[2])])


def _grouped_mm_weight_grad(x: Tensor, g: Tensor, offs: Tensor) -> Tensor:
    return torch.stack([x[rows].t() @ g[rows] for rows in _groups(offs)])


def _spread_rows(x: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    return spread_meaning(x, order, picks)


def _collect_rows(rows: Tensor, order: Tensor, inverse: Tensor, offs: Tensor, picks: int) -> Tensor:
    return collect_meaning(rows, inverse, offs, picks)


INTERPRETERS[torch.ops.moe_compile.grouped_mm.default] = _grouped_mm
INTERPRETERS[torch.ops.moe_compile.grouped_mm_weight_grad.default] = _grouped_mm_weight_grad
INTERPRETERS[torch.ops.moe_compile.spread_rows.default] = _spread_rows
INTERPRETERS[torch.ops.moe_compile.collect_rows.default] = _collect_rows

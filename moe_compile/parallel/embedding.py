"""The token embedding, whose table stays where its rows are: ids travel, and the rows they ask for.

FSDP2 would gather the whole table before the first layer and reduce the whole of its gradient after
the last one, while nothing is computed. Here each rank looks up its own rows for the ids of all
ranks, and every rank gets the sum, as of a vocabulary-parallel embedding (Megatron-LM, Shoeybi et
al. 2019), whose ranks have other ids each. For the collectives all ranks bring as many ids, padded
to the most that was promised, and look up equally often.

The table is split like a parameter of FSDP2, which leaves it alone; its gradient is the mean over
all ranks, summed by the owner of each row, in the table's dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from moe_compile.install.forward import bind
from moe_compile.kernels.deep_ep import check_bound
from moe_compile.parallel.experts import distribute
from moe_compile.parallel.layout import Layout

_NOBODY = -1
"""The id of what is padded."""


def should_stay(model: nn.Module, embedding: nn.Embedding, layout: Layout, most: int) -> bool:
    """Whether the rows of a model's token embedding should stay on their ranks.

    They are of a table that nothing else in the model has, more than what all ranks ask for; and
    no more is done to them and their gradients than `nn.Embedding` does by default. Without experts
    to share out, no rank depends on how often another calls what: it stays so.
    """
    special = embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq
    homes = [p for _, p in model.named_parameters(remove_duplicate=False) if p is embedding.weight]
    if special or len(homes) > 1 or "forward" in vars(embedding) or layout.experts is None:
        return False
    rows, ranks = embedding.weight.shape[0], layout.data["dp_shard"].size()
    every_rank_has_one = _rows_of_a_rank(rows, ranks) * (ranks - 1) < rows
    return every_rank_has_one and most * ranks < rows


def shard_embedding(embedding: nn.Embedding, layout: Layout, most: int) -> nn.Parameter:
    """Leaves each rank its rows of the table, and returns the parameter that they are.

    Every rank holds the whole table before. Meta stays meta.

    Args:
        embedding: one that `should_stay`.
        layout: the ranks, of which all have other ids.
        most: the ids that no rank brings more of.
    """
    names = layout.data.mesh_dim_names or ()
    placements = [Shard(0) if name == "dp_shard" else Replicate() for name in names]
    whole = embedding.weight
    rows = nn.Parameter(
        distribute(whole.detach(), layout.data, placements, layout.device), whole.requires_grad
    )
    vars(rows).update(vars(whole))
    embedding.weight = rows
    bind(embedding, _forward_for(layout, most))
    return rows


def _forward_for(layout: Layout, most: int) -> Callable[..., Tensor]:
    """`nn.Embedding.forward` on the rows of a rank; all ranks must call it."""
    names = layout.data.mesh_dim_names or ()
    mesh = layout.data["dp_shard"]
    grads = [Shard(0) if name == "dp_shard" else Partial() for name in names]

    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        _check(input, most)
        weight: Any = self.weight
        own = weight.redistribute(placements=weight.placements).to_local(grad_placements=grads)
        first = mesh.get_local_rank() * _rows_of_a_rank(weight.shape[0], mesh.size())
        ids = _in_table(input.flatten().long(), weight.shape[0])
        told = most, first, self.padding_idx, layout.ranks, mesh
        rows: Tensor = _Lookup.apply(ids, own, *told)
        return rows.view(*input.shape, own.shape[1])

    return forward


def _rows_of_a_rank(rows: int, ranks: int) -> int:
    """All but the last have so many."""
    return -(-rows // ranks)


def _check(ids: Tensor, most: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the embedding got ids of {ids.dtype}; it takes torch.int64 or torch.int32; cast them"
        )
    check_bound(ids.numel(), most, "the embedding")


def _in_table(ids: Tensor, rows: int) -> Tensor:
    torch.ops.aten._assert_async.msg(
        ((ids >= 0) & (ids < rows)).all(), f"an id is not in the embedding's table of {rows} rows"
    )
    return ids


class _Lookup(torch.autograd.Function):
    """Rows [T, H] of ids [T], for T up to `most`; gradients are divided by `ranks`.

    own: [V / ranks, H], a rank's rows of the table, from `first` on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        own: Tensor,
        most: int,
        first: int,
        padding: int | None,
        ranks: int,
        mesh: DeviceMesh,
    ) -> Tensor:
        every = _of_all_ranks(_padded(ids, most, _NOBODY), mesh)
        count = own.shape[0]
        is_own = (every >= first) & (every < first + count)
        found = F.embedding(torch.where(is_own, every - first, 0), own)
        found.masked_fill_(~is_own[:, None], 0)
        if padding is not None:
            is_own &= every != padding
        ctx.most, ctx.count, ctx.ranks, ctx.mesh = most, count, ranks, mesh
        ctx.save_for_backward(torch.where(is_own, every - first, count))
        parts = DTensor.from_local(found, mesh, [Partial()], run_check=False)
        rows = parts.redistribute(placements=[Shard(0)]).to_local()
        return rows if ids.shape[0] == most else rows[: ids.shape[0]].clone()  # to be written to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of rows that are not here go to a row too many."""
        (places,), count = ctx.saved_tensors, ctx.count
        every = _of_all_ranks(_padded(grads[0] / ctx.ranks, ctx.most, 0), ctx.mesh)
        sums = torch.ops.aten.embedding_dense_backward(every, places, count + 1, count, False)
        return None, sums[:count], *[None] * 5


def _padded(rows: Tensor, most: int, value: int) -> Tensor:
    """rows [T, ...], with more of `value` up to `most`."""
    more = most - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, more), value=value) if more else rows


def _of_all_ranks(rows: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(rows.contiguous(), mesh, [Shard(0)], run_check=False).full_tensor()

"""Dispatch and combine on `all_to_all_single`: one copy of a token to each rank that needs it.

Three custom ops without state. `all_to_all_dispatch` returns as plain tensors all that the way back
needs, so a graph that holds them can be traced again, recomputed and reordered:

* the backward of dispatch is `all_to_all_combine` with the weights' gradient beside the rows';
* the backward of combine is `all_to_all_redispatch`, whose sizes are known already.

Every rank of the group must make each call, with any number of tokens. Dispatch waits for the
device once, to learn how many rows come.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of a name, as graphs hold it."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _exchange(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


@torch.library.custom_op("moe_compile::all_to_all_dispatch", mutates_args=())
def all_to_all_dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send tokens to the ranks of their experts; arguments as in `ops.dispatch`.

    Returns:
        rows [U, H], local ids [U, K], weights [U, K], places [P, 0]; and for the way back the
        source [V], the token of each row sent, in the order of ranks, the splits [2, ranks], on the
        CPU: the rows sent to and received from each rank, and arrived [U, 0], without elements.
    """
    ranks = process_group(group)
    source, splits, num_picks = plan_dispatch(ids, num_experts, ranks)
    sent, received = splits.tolist()
    rows, their_ids, their_weights = (
        _exchange(t.index_select(0, source), received, sent, ranks) for t in (x, ids, weights)
    )
    here = local_ids(their_ids, num_experts, ranks)
    places, arrived = (x.new_empty(count, 0) for count in (num_picks, sum(received)))
    return rows, here, their_weights, places, source, splits, arrived


def plan_dispatch(
    ids: Tensor, num_experts: int, ranks: dist.ProcessGroup
) -> tuple[Tensor, Tensor, int]:
    """The source and the splits of a dispatch, and P; waits for the device, and for all ranks."""
    local = num_experts // ranks.size()
    owner = torch.where(ids >= 0, ids // local, -1)
    is_owner = owner == torch.arange(ranks.size(), device=ids.device)[:, None, None]
    is_sent = is_owner.any(-1)
    source = is_sent.nonzero()[:, 1].clone()  # contiguous() may keep the offset
    sent = torch.stack((is_sent.sum(1), is_owner.sum((1, 2))), dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ranks)
    rows, picks = torch.stack((sent, received)).cpu().unbind(-1)
    return source, rows.clone(), int(picks[1].sum())


def local_ids(ids: Tensor, num_experts: int, ranks: dist.ProcessGroup) -> Tensor:
    """Ids of all experts as those of a rank's own: -1 for others."""
    local, first = num_experts // ranks.size(), num_experts // ranks.size() * ranks.rank()
    is_here = (ids >= first) & (ids < first + local)
    return torch.where(is_here, ids - first, -1)


@torch.library.custom_op("moe_compile::all_to_all_combine", mutates_args=())
def all_to_all_combine(
    y: Tensor,
    weights: Tensor | None,
    source: Tensor,
    splits: Tensor,
    arrived: Tensor,
    num_tokens: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Return rows y [U, H], and weights [U, K] where given, and sum those of each token.

    Returns:
        [num_tokens, H] and [num_tokens, K], or [0, 0] without weights.
    """
    ranks = process_group(group)
    sent, received = splits.tolist()
    out = sum_of_tokens(_exchange(y, sent, received, ranks), source, sent, num_tokens)
    if weights is None:
        return out, y.new_empty(0, 0)
    return out, sum_of_tokens(_exchange(weights, sent, received, ranks), source, sent, num_tokens)


def sum_of_tokens(rows: Tensor, source: Tensor, sent: list[int], num_tokens: int) -> Tensor:
    """[num_tokens, W] of rows [V, W]: rank after rank, so that the sum has one order on a GPU too.

    From one rank a token gets one row at most, so no two rows of a part meet. They are summed in
    float32, as they would be where all experts of a token are at home.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = wide.new_zeros(num_tokens, rows.shape[1])
    for part, tokens in zip(wide.split(sent), source.split(sent), strict=True):
        out.index_add_(0, tokens, part)
    return out.to(rows.dtype)


@torch.library.custom_op("moe_compile::all_to_all_redispatch", mutates_args=())
def all_to_all_redispatch(
    g: Tensor, source: Tensor, splits: Tensor, arrived: Tensor, group: str
) -> Tensor:
    """Send g [T, H] as dispatch sent x; returns [U, H]."""
    sent, received = splits.tolist()
    return _exchange(g.index_select(0, source), received, sent, process_group(group))


@all_to_all_dispatch.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str) -> Any:
    context = torch.library.get_ctx()
    rows, picks, sent = (context.new_dynamic_size() for _ in range(3))
    return (
        x.new_empty(rows, x.shape[1]),
        ids.new_empty(rows, ids.shape[1]),
        weights.new_empty(rows, weights.shape[1]),
        x.new_empty(picks, 0),
        ids.new_empty(sent),
        ids.new_empty(2, process_group(group).size(), device="cpu"),
        x.new_empty(rows, 0),
    )


@all_to_all_combine.register_fake
def _(
    y: Tensor,
    weights: Tensor | None,
    source: Tensor,
    splits: Tensor,
    arrived: Tensor,
    num_tokens: int,
    group: str,
) -> Any:
    out = y.new_empty(num_tokens, y.shape[1])
    if weights is None:
        return out, y.new_empty(0, 0)
    return out, weights.new_empty(num_tokens, weights.shape[1])


@all_to_all_redispatch.register_fake
def _(g: Tensor, source: Tensor, splits: Tensor, arrived: Tensor, group: str) -> Tensor:
    return g.new_empty(arrived.shape[0], g.shape[1])


def _save_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, _, ctx.group = inputs
    ctx.num_tokens = x.shape[0]
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(output[1], *output[3:])


def _dispatch_backward(ctx: Any, rows: Tensor, _: Any, weights: Tensor, *__: Any) -> Any:
    grads = all_to_all_combine(rows, weights, *ctx.saved_tensors, ctx.num_tokens, ctx.group)
    return grads[0], None, grads[1], None, None


def _save_combine(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, *handle, _, ctx.group = inputs
    ctx.save_for_backward(*handle)
    ctx.mark_non_differentiable(output[1])


def _combine_backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    return all_to_all_redispatch(grad, *ctx.saved_tensors, ctx.group), *[None] * 6


all_to_all_dispatch.register_autograd(_dispatch_backward, setup_context=_save_dispatch)
all_to_all_combine.register_autograd(_combine_backward, setup_context=_save_combine)

"""Dispatch and combine by DeepEP's `ElasticBuffer` (V2), inside one machine.

The three ops and their backwards mean what those of `deep_ep` do, with another handle. Three things
differ in the library, and end here:

* A buffer holds up to a number of tokens, the same on all ranks, and a rank may bring any number.
  So a dispatch without `max_tokens` begins by exchanging the largest. Its power of two is the bound
  of this dispatch, and the buffer is made larger where that needs it. The handle keeps the bound:
  it lays out the buffer for the way back, in whatever larger buffer is there by then.
* Kernels are compiled when they are first used, one for each bound: hence the powers of two.
* A token's place among a rank's rows is drawn by an atomic addition, and changes from run to run.
  Rows are sorted here by rank and token, so that what is recomputed is what was computed.

Every rank of the group must make each call, with any number of tokens; no token may pick an expert
twice. Dispatch waits for the device, to learn the largest number of tokens and how many rows come;
with `max_tokens` it does not, and the rows that did not come are as in `deep_ep`.

Below, T are a rank's tokens, U the rows it receives, R the ranks, L the experts on each.
"""

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.kernels.all_to_all import process_group
from moe_compile.kernels.deep_ep import (
    BUFFERS,
    check_bound,
    complete,
    places_of,
    sent,
    unknown_sizes,
    wait_for,
)
from moe_compile.kernels.deep_ep_sms import library
from moe_compile.kernels.in_flight import Land

_LEAST_BOUND = 256
"""Below it a buffer is small anyway, and every bound costs a compilation."""

_LAST = torch.iinfo(torch.int32).max
"""The source of a row that did not come, which is sorted behind all that did."""


def _bound(tokens: int, device: torch.device, name: str) -> int:
    """A power of two that no rank's tokens exceed; the same on all ranks of the group."""
    largest = torch.tensor([tokens], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, process_group(name))
    return max(_LEAST_BOUND, 1 << (int(largest) - 1).bit_length())


def _buffer(bound: int, hidden: int, picks: int, name: str) -> Any:
    """The group's buffer, made or made larger here: all ranks get here with the same numbers."""
    group, elastic, held = process_group(name), library().ElasticBuffer, BUFFERS.get(name)
    size = elastic.get_buffer_size_hint(group, bound, hidden, picks, allow_hybrid_mode=False)
    if held is not None and held.group is group and held.num_bytes >= size:
        return held
    if held is not None:
        held.destroy()
    # Inside one machine nothing travels over a network, and without one it would stop here.
    os.environ.setdefault("EP_DISABLE_GIN", "1")
    BUFFERS[name] = elastic(group, size, allow_hybrid_mode=False, explicitly_destroy=True)
    return BUFFERS[name]


def _library_handle(handle: list[Tensor]) -> Any:
    """The library's handle of a dispatch, made of its tensors again."""
    per_rank, per_expert, numbers, _, source, slots, picks = handle
    num_experts, bound, num_sms = numbers.tolist()
    return library().EPHandle(
        do_expand=False,
        num_experts=num_experts,
        expert_alignment=1,
        num_max_tokens_per_rank=bound,
        num_sms=num_sms,
        topk_idx=picks,
        num_recv_tokens=source.shape[0],
        num_expanded_tokens=0,
        num_recv_tokens_per_expert_list=[],
        psum_num_recv_tokens_per_scaleup_rank=per_rank,
        psum_num_recv_tokens_per_expert=per_expert,
        num_unaligned_recv_tokens_per_expert=per_expert,  # checked, but read in expand mode only
        recv_src_metadata=source,
        dst_buffer_slot_idx=slots,
        token_metadata_at_forward=None,
        channel_linked_list=None,
    )


@torch.library.custom_op("moe_compile::deep_ep_elastic_dispatch", mutates_args=())
def elastic_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send tokens to the ranks of their experts; arguments as in `ops.dispatch`, x in bfloat16.

    Returns:
        rows [U, H], local ids [U, K], weights [U, K], places [P, 0]; and the handle: the prefix
        sums of rows by rank [R] and by expert [L]; on the CPU [3], the experts, the bound and the
        SMs; the order of the rows in the buffer [U], and their sources [U, 2 + K]; where what was
        sent went [T, K], and its picks [T, K].
    """
    results: Any = begin_dispatch(x, ids, weights, num_experts, group, max_tokens)()
    return results


def begin_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None,
    *,
    is_async: bool = False,
) -> Land:
    """Starts the kernels of a dispatch; the rest is all that `elastic_dispatch` returns."""
    check_bound(x.shape[0], max_tokens)
    bound = max_tokens or _bound(x.shape[0], x.device, group)
    buffer = _buffer(bound, x.shape[1], ids.shape[1], group)
    x, picks, given = sent(is_async, x, ids.to(torch.int64), weights.to(torch.float32))
    arrived, picked, weighed, handle, event = buffer.dispatch(
        x,
        topk_idx=picks,
        topk_weights=given,
        num_experts=num_experts,
        num_max_tokens_per_rank=bound,
        do_cpu_sync=max_tokens is None,
        async_with_compute_stream=is_async,
    )

    def land() -> tuple[Tensor, ...]:
        wait_for(event, is_async)
        rows, local_ids, their_weights, order, source = _ordered(arrived, picked, weighed, handle)
        return (
            rows,
            local_ids.to(ids.dtype),
            their_weights.to(weights.dtype),
            places_of(rows, local_ids, handle.num_recv_tokens_per_expert_list),
            handle.psum_num_recv_tokens_per_scaleup_rank,
            handle.psum_num_recv_tokens_per_expert.clone(),  # a slice
            torch.tensor([num_experts, bound, handle.num_sms]),
            order,
            source,
            handle.dst_buffer_slot_idx,
            handle.topk_idx,
        )

    return land


def _ordered(arrived: Tensor, picked: Tensor, weighed: Tensor, handle: Any) -> tuple[Tensor, ...]:
    """What came, by rank and token; the order, and the sources in it."""
    per_rank, sources = handle.psum_num_recv_tokens_per_scaleup_rank, handle.recv_src_metadata
    is_missing = torch.arange(sources.shape[0], device=arrived.device) >= per_rank[-1]
    order = sources[:, 0].masked_fill(is_missing, _LAST).argsort()
    rows, local_ids, their_weights, source = (
        t.index_select(0, order) for t in (arrived, picked, weighed, sources)
    )
    local_ids.masked_fill_(is_missing[:, None], -1)
    # The way back brings a weight's gradient from its expert's rank alone: others get zeros.
    their_weights.masked_fill_(local_ids < 0, 0)
    return rows, local_ids, their_weights, order, source


@torch.library.custom_op("moe_compile::deep_ep_elastic_combine", mutates_args=())
def elastic_combine(
    y: Tensor, weights: Tensor | None, handle: list[Tensor], group: str
) -> tuple[Tensor, Tensor]:
    """Return rows y [U, H], and weights [U, K] where given, and sum the rows of each token.

    Returns:
        [T, H], sums in float32; and [T, K], of each pick what its expert's rank gave, or [0, 0]
        without weights.
    """
    results: Any = begin_combine(y, weights, handle, group)()
    return results


def begin_combine(
    y: Tensor, weights: Tensor | None, handle: list[Tensor], group: str, *, is_async: bool = False
) -> Land:
    """Starts the kernels of a combine; the rest is all that `elastic_combine` returns."""
    theirs, picks = _library_handle(sent(is_async, *handle)), handle[6].shape[1]
    buffer = _buffer(theirs.num_max_tokens_per_rank, y.shape[1], picks, group)
    (rows,) = sent(is_async, y)
    weighed = None if weights is None else sent(is_async, weights.to(torch.float32))[0]
    out, back, event = buffer.combine(
        rows, theirs, topk_weights=weighed, async_with_compute_stream=is_async
    )

    def land() -> tuple[Tensor, ...]:
        wait_for(event, is_async)
        return out, y.new_empty(0, 0) if weights is None else back.to(weights.dtype)

    return land


@torch.library.custom_op("moe_compile::deep_ep_elastic_redispatch", mutates_args=())
def elastic_redispatch(g: Tensor, handle: list[Tensor], group: str) -> Tensor:
    """Send g [T, H] as dispatch sent x; returns [U, H]."""
    return begin_redispatch(g, handle, group)()[0]


def begin_redispatch(
    g: Tensor, handle: list[Tensor], group: str, *, is_async: bool = False
) -> Land:
    """Starts the kernels of a redispatch."""
    handle = sent(is_async, *handle)
    theirs, picks, order = _library_handle(handle), handle[6].shape[1], handle[3]
    buffer = _buffer(theirs.num_max_tokens_per_rank, g.shape[1], picks, group)
    rows, *_, event = buffer.dispatch(
        *sent(is_async, g),
        handle=theirs,
        num_sms=theirs.num_sms,
        async_with_compute_stream=is_async,
    )

    def land() -> tuple[Tensor, ...]:
        wait_for(event, is_async)
        return (rows.index_select(0, order),)

    return land


@elastic_dispatch.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
) -> Any:
    ranks = process_group(group).size()
    rows, places = unknown_sizes(ranks, ids.shape[1], max_tokens)
    return (
        x.new_empty(rows, x.shape[1]),
        ids.new_empty(rows, ids.shape[1]),
        weights.new_empty(rows, ids.shape[1]),
        x.new_empty(places, 0),
        *fake_handle(ids, rows, ids.shape[0], ids.shape[1], ranks, num_experts // ranks),
    )


def fake_handle(
    like: Tensor, rows: Any, tokens: Any, picks: int, ranks: int, local: int
) -> list[Tensor]:
    """The tensors of a handle without their data."""
    new = functools.partial(like.new_empty, dtype=torch.int32)
    return [
        new((ranks,)),
        new((local,)),
        like.new_empty(3, dtype=torch.int64, device="cpu"),
        like.new_empty(rows, dtype=torch.int64),
        new((rows, 2 + picks)),
        new((tokens, picks)),
        like.new_empty((tokens, picks), dtype=torch.int64),
    ]


complete(elastic_dispatch, elastic_combine, elastic_redispatch)

"""Dispatch and combine of `all_to_all` as pairs of start and wait; see `pairs`.

A dispatch begins by exchanging counts, for which it waits, as it does in one piece: what overlaps
are the rows. While they travel, they belong to the collective (`in_flight`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.kernels import in_flight
from moe_compile.kernels.all_to_all import local_ids, plan_dispatch, process_group, sum_of_tokens
from moe_compile.kernels.in_flight import Land, stand_in
from moe_compile.kernels.pairs import Pairs, done


def _begin(
    sent: Sequence[Tensor], outs: list[int], ins: list[int], ranks: dist.ProcessGroup
) -> Land:
    """Exchanges rows, `outs` of them from each rank and `ins` to each."""
    given = [t.contiguous() for t in sent]
    results = tuple(t.new_empty(sum(outs), *t.shape[1:]) for t in given)
    works: list[Any] = [
        dist.all_to_all_single(out, t, outs, ins, group=ranks, async_op=True)
        for out, t in zip(results, given, strict=True)
    ]

    def land() -> tuple[Tensor, ...]:
        for work in works:
            work.wait()
        given.clear()
        return results

    return land


@torch.library.custom_op("moe_compile::all_to_all_start_dispatch", mutates_args=())
def start_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Begin what `all_to_all_dispatch` does; known are the source and the splits."""
    ranks = process_group(group)
    source, splits = plan_dispatch(ids, num_experts, ranks)
    sent, received = splits.tolist()
    arrive = _begin([t.index_select(0, source) for t in (x, ids, weights)], received, sent, ranks)

    def land() -> tuple[Tensor, ...]:
        rows, theirs, weighed = arrive()
        return rows, local_ids(theirs, num_experts, ranks), weighed

    stand_ins = stand_in(x), stand_in(ids), stand_in(weights)
    in_flight.put(stand_ins[0], land)
    return done(x), *stand_ins, source, splits


@torch.library.custom_op("moe_compile::all_to_all_wait_dispatch", mutates_args=())
def wait_dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, known: list[Tensor], group: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [U, H], local ids [U, K] and weights [U, K]."""
    rows, theirs, weighed = in_flight.take(x)
    return done(x), rows, theirs, weighed


@torch.library.custom_op("moe_compile::all_to_all_start_combine", mutates_args=())
def start_combine(
    y: Tensor, weights: Tensor | None, handle: list[Tensor], group: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Begin to return rows y [U, H], and weights [U, K] where given."""
    sent, received = handle[1].tolist()
    given = [y] if weights is None else [y, weights]
    stand = stand_in(y)
    in_flight.put(stand, _begin(given, sent, received, process_group(group)))
    return done(y), stand, y.new_empty(0, 0) if weights is None else stand_in(weights)


@torch.library.custom_op("moe_compile::all_to_all_wait_combine", mutates_args=())
def wait_combine(
    y: Tensor,
    weights: Tensor | None,
    handle: list[Tensor],
    num_tokens: int,
    group: str,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of each token: [num_tokens, H], and [num_tokens, K] or [0, 0] without weights."""
    source, splits = handle
    sent = splits[0].tolist()
    back = [sum_of_tokens(rows, source, sent, num_tokens) for rows in in_flight.take(y)]
    return done(y), back[0], y.new_empty(0, 0) if weights is None else back[1]


@torch.library.custom_op("moe_compile::all_to_all_start_redispatch", mutates_args=())
def start_redispatch(
    g: Tensor, handle: list[Tensor], group: str, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Begin to send g [T, H] as dispatch sent x."""
    source, splits = handle
    sent, received = splits.tolist()
    stand = stand_in(g)
    rows = g.index_select(0, source)
    in_flight.put(stand, _begin([rows], received, sent, process_group(group)))
    return done(g), stand


@torch.library.custom_op("moe_compile::all_to_all_wait_redispatch", mutates_args=())
def wait_redispatch(g: Tensor, num_rows: int, after: Tensor | None) -> tuple[Tensor, Tensor]:
    """[num_rows, H], as many as dispatch received."""
    return done(g), *in_flight.take(g)


@start_dispatch.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None,
    after: Tensor | None,
) -> Any:
    sent = torch.library.get_ctx().new_dynamic_size()
    splits = ids.new_empty(2, process_group(group).size(), device="cpu")
    stand_ins = stand_in(x), stand_in(ids), stand_in(weights)
    return done(x), *stand_ins, ids.new_empty(sent), splits


@wait_dispatch.register_fake
def _(
    x: Tensor, ids: Tensor, weights: Tensor, known: list[Tensor], group: str, after: Tensor | None
) -> Any:
    rows = torch.library.get_ctx().new_dynamic_size()
    return done(x), *(t.new_empty(rows, t.shape[1]) for t in (x, ids, weights))


PAIRS = Pairs(
    start_dispatch,
    wait_dispatch,
    start_combine,
    wait_combine,
    start_redispatch,
    wait_redispatch,
    handle=lambda known, arrived: list(known),
)
PAIRS.complete()

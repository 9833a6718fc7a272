"""How `all_to_all` sends rows without waiting for them; see `pairs`.

A dispatch begins by exchanging counts, for which it waits, as it does in one piece.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.kernels.all_to_all import local_ids, plan_dispatch, process_group, sum_of_tokens
from moe_compile.kernels.in_flight import Land, private
from moe_compile.kernels.pairs import Dispatcher, Known


def _begin(
    rows: Sequence[Tensor], received: list[int], sent: list[int], ranks: dist.ProcessGroup
) -> Land:
    """Exchanges rows, which nobody else has: how many come from each rank, and go there."""
    given = list(rows)
    results = tuple(t.new_empty(sum(received), *t.shape[1:]) for t in given)
    works: list[Any] = [
        dist.all_to_all_single(out, t, received, sent, group=ranks, async_op=True)
        for out, t in zip(results, given, strict=True)
    ]

    def land() -> tuple[Tensor, ...]:
        for work in works:
            work.wait()
        given.clear()
        return results

    return land


def _begin_dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str, max_tokens: int | None
) -> tuple[Known, Land]:
    """Known are the source and the splits, and by a tensor without elements T."""
    ranks = process_group(group)
    source, splits, num_picks = plan_dispatch(ids, num_experts, ranks)
    sent, received = splits.tolist()
    arrive = _begin([t.index_select(0, source) for t in (x, ids, weights)], received, sent, ranks)

    def land() -> tuple[Tensor, ...]:
        rows, theirs, weighed = arrive()
        here = local_ids(theirs, num_experts, ranks)
        places, arrived = (x.new_empty(count, 0) for count in (num_picks, sum(received)))
        return rows, here, weighed, places, arrived

    return (source, splits, x.new_empty(x.shape[0], 0)), land


def _begin_combine(y: Tensor, weights: Tensor | None, handle: Known, group: str) -> Land:
    source, splits, tokens, _ = handle
    sent, received = splits.tolist()
    given = [private(t) for t in (y, weights) if t is not None]
    arrive = _begin(given, sent, received, process_group(group))

    def land() -> tuple[Tensor, ...]:
        sums = [sum_of_tokens(rows, source, sent, tokens.shape[0]) for rows in arrive()]
        return sums[0], sums[1] if len(sums) == 2 else y.new_empty(0, 0)

    return land


def _begin_redispatch(g: Tensor, handle: Known, group: str) -> Land:
    source, splits, *_ = handle
    sent, received = splits.tolist()
    return _begin([g.index_select(0, source)], received, sent, process_group(group))


def _fake_known(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str, *_: Any
) -> Known:
    sent = torch.library.get_ctx().new_dynamic_size()
    splits = ids.new_empty(2, process_group(group).size(), device="cpu")
    return ids.new_empty(sent), splits, x.new_empty(x.shape[0], 0)


def _fake_arrived(x: Tensor, *_: Any) -> tuple[Any, Any, Known]:
    context = torch.library.get_ctx()
    rows, places = context.new_dynamic_size(), context.new_dynamic_size()
    return rows, places, [x.new_empty(rows, 0)]


DISPATCHER = Dispatcher(
    "all_to_all",
    _begin_dispatch,
    _begin_combine,
    _begin_redispatch,
    known=3,
    arrived=1,
    fake_known=_fake_known,
    fake_arrived=_fake_arrived,
    handle=lambda known, arrived: [*known, *arrived],
)

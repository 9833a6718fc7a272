"""How both interfaces of DeepEP send rows without waiting for them; see `pairs`.

The kernels run on DeepEP's own stream, which first waits for the current one; the event that the
library gives then lets the current stream wait for them. Memory is the current stream's, and the
library sees to it that none is reused too early, as long as the event is there. A dispatch that was
not promised how many tokens come waits on the host for the counts, as it does in one piece.

Letters as in `deep_ep` and `deep_ep_elastic`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moe_compile.kernels import deep_ep, deep_ep_elastic
from moe_compile.kernels.all_to_all import process_group
from moe_compile.kernels.in_flight import Land
from moe_compile.kernels.pairs import Dispatcher, Known


def _begin_dispatch(*given: Any) -> tuple[Known, Land]:
    """Known is whether a token goes to a rank [T, R]."""
    is_sent, land = deep_ep.begin_dispatch(*given, is_async=True)

    def arrive() -> tuple[Tensor, ...]:
        *arrived, _, heads = land()
        return *arrived, heads

    return (is_sent,), arrive


def _fake_known(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str, *_: Any
) -> Known:
    return (ids.new_empty((x.shape[0], process_group(group).size()), dtype=torch.bool),)


def _fake_arrived(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    known: Known,
    group: str,
    max_tokens: int | None,
    after: Tensor | None,
) -> tuple[Any, Any, Known]:
    tokens, ranks = known[0].shape
    rows, places = deep_ep.unknown_sizes(ranks, ids.shape[1], max_tokens)
    channels = deep_ep.unknown_channels(max_tokens)
    sizes = (ranks, ranks), (ranks, channels), (ranks, channels), (rows,), (tokens, ranks)
    return rows, places, [ids.new_empty(size, dtype=torch.int32) for size in sizes]


def _begin_elastic_dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str, max_tokens: int | None
) -> tuple[Known, Land]:
    """Known are, by a tensor without elements, T and L."""
    given = x, ids, weights, num_experts, group, max_tokens
    sizes = _elastic_sizes(x, ids, weights, num_experts, group)
    return sizes, deep_ep_elastic.begin_dispatch(*given, is_async=True)


def _elastic_sizes(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str, *_: Any
) -> Known:
    return (x.new_empty(x.shape[0], num_experts // process_group(group).size(), 0),)


def _fake_elastic_arrived(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    known: Known,
    group: str,
    max_tokens: int | None,
    after: Tensor | None,
) -> tuple[Any, Any, Known]:
    ranks, picks, (tokens, local, _) = process_group(group).size(), ids.shape[1], known[0].shape
    rows, places = deep_ep.unknown_sizes(ranks, picks, max_tokens)
    return rows, places, deep_ep_elastic.fake_handle(ids, rows, tokens, picks, ranks, local)


DISPATCHER = Dispatcher(
    "deep_ep",
    _begin_dispatch,
    functools.partial(deep_ep.begin_combine, is_async=True),
    functools.partial(deep_ep.begin_redispatch, is_async=True),
    known=1,
    arrived=5,
    fake_known=_fake_known,
    fake_arrived=_fake_arrived,
    handle=lambda known, arrived: [*arrived[:4], known[0], arrived[4]],
)

ELASTIC = Dispatcher(
    "deep_ep_elastic",
    _begin_elastic_dispatch,
    functools.partial(deep_ep_elastic.begin_combine, is_async=True),
    functools.partial(deep_ep_elastic.begin_redispatch, is_async=True),
    known=1,
    arrived=7,
    fake_known=_elastic_sizes,
    fake_arrived=_fake_elastic_arrived,
    handle=lambda _, arrived: list(arrived),
)

"""Dispatch and combine by DeepEP's `Buffer`, over NVLink: one copy of a token to each rank.

Three custom ops without state, as in `all_to_all`. `deep_ep_dispatch` returns the six tensors of
DeepEP's handle as plain outputs, and the other two take them, so a graph that holds them can be
traced again, recomputed and reordered:

* the backward of dispatch is `deep_ep_combine` with the weights' gradient beside the rows';
* the backward of combine is `deep_ep_redispatch`: no layout, no waiting.

Every rank of the group must make each call, with any number of tokens. No event outlives one of
these ops: each ends on the current stream (`deep_ep_pairs` is for those that do not). Dispatch
waits for the device once, to learn how many rows come; but not where `max_tokens` bounds T on every
rank. U is then what could come at most, R times the bound, and the rows that did not come are at
the end: ids of -1, weights of 0, and whatever the memory held. Combine never reads them, and
redispatch leaves such rows in its result, too.

Below, T are a rank's tokens, U the rows it receives, R the ranks, C the channels: half the SMs that
the kernels take.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moe_compile.kernels.all_to_all import process_group
from moe_compile.kernels.deep_ep_layout import dispatch_layout
from moe_compile.kernels.deep_ep_sms import configs, library
from moe_compile.kernels.in_flight import Land, private

BUFFERS: dict[str, Any] = {}
"""The one buffer of each process group, by the group's name."""

AHEAD: set[str] = set()
"""The groups whose last dispatch did not wait: the device may still owe the host its counts."""


def _buffer(hidden: int, name: str, sms: int) -> tuple[Any, Any, Any]:
    """The group's buffer, and the configurations of dispatch and combine.

    It is made, or made larger, here: all ranks get here with the same width and number of SMs.
    """
    found = configs(sms, process_group(name).size())
    return _large_enough(hidden, name, found), *found


def _large_enough(hidden: int, name: str, found: tuple[Any, Any]) -> Any:
    group = process_group(name)
    size = max(config.get_nvl_buffer_size_hint(hidden * 2, group.size()) for config in found)
    held = BUFFERS.get(name)
    if held is not None and held.group is group and held.num_nvl_bytes >= size:
        return held
    if held is not None:
        held.destroy()
    BUFFERS[name] = library().Buffer(group, size, 0, explicitly_destroy=True)
    return BUFFERS[name]


def destroy_buffers() -> None:
    """Frees every buffer; all ranks must call it, while their process groups exist."""
    while BUFFERS:
        BUFFERS.popitem()[1].destroy()


def check_bound(tokens: int, max_tokens: int | None, what: str = "a layer of experts") -> None:
    """Refuses more tokens than were promised, before any rank writes behind its rows."""
    if max_tokens is not None and tokens > max_tokens:
        raise ValueError(
            f"{what} got {tokens} tokens from one rank; it takes up to {max_tokens}, "
            "which OptimizeConfig.max_tokens_per_rank promised; optimize the model with a larger "
            "number, or without one, or make the batch smaller"
        )


def _wait_for_counts(group: str, device: torch.device, max_tokens: int | None) -> None:
    """Lets no dispatch that waits for its counts read those of an earlier one that did not.

    The library has one place on the host for the counts of all dispatches.
    """
    if max_tokens is not None:
        AHEAD.add(group)
    elif group in AHEAD:
        torch.get_device_module(device).synchronize()
        AHEAD.remove(group)


@torch.library.custom_op("moe_compile::deep_ep_dispatch", mutates_args=())
def deep_ep_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
    sms: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send tokens to the ranks of their experts; arguments as in `ops.dispatch`, x in bfloat16.

    Args:
        sms: the multiprocessors of the kernels, here and wherever the handle goes; None is the
            library's own number.

    Returns:
        rows [U, H], local ids [U, K], weights [U, K], places [P, 0]; and the handle: the prefix
        sums of ranks [R, R], of channels sent [R, C] and received [R, C], the source of each row
        [U], whether a token goes to a rank [T, R], and the heads of the queues of what was sent
        [T, R].
    """
    results: Any = begin_dispatch(x, ids, weights, num_experts, group, max_tokens, sms)[1]()
    return results


def begin_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None,
    sms: int | None = None,
    *,
    is_async: bool = False,
) -> tuple[Tensor, Land]:
    """Starts the kernels of a dispatch; the rest is all that `deep_ep_dispatch` returns.

    Returns:
        whether a token goes to a rank [T, R], which is known at once, and what gives the rest.
    """
    check_bound(x.shape[0], max_tokens)
    _wait_for_counts(group, x.device, max_tokens)
    buffer, config, _ = _buffer(x.shape[1], group, sms or library().Buffer.num_sms)
    x, picks, weighed = sent(is_async, x, ids.to(torch.int64), weights.to(torch.float32))
    ranks = process_group(group).size()
    per_rank, per_expert, is_sent = dispatch_layout(picks, num_experts, ranks)
    rows, local_ids, their_weights, counts, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=is_sent,
        num_tokens_per_expert=per_expert,
        topk_idx=picks,
        topk_weights=weighed,
        num_worst_tokens=(max_tokens or 0) * ranks,
        config=config,
        async_finish=is_async,
    )

    def land() -> tuple[Tensor, ...]:
        wait_for(event, is_async)
        if is_async:  # else what calls the op does
            their_weights.masked_fill_(local_ids < 0, 0)
        places = places_of(rows, local_ids, counts)
        return rows, local_ids.to(ids.dtype), their_weights.to(weights.dtype), places, *handle

    return is_sent, land


def places_of(rows: Tensor, ids: Tensor, counts: list[int]) -> Tensor:
    """[P, 0] for the picks of each expert, which the library counts unless it has a bound."""
    return rows.new_empty(sum(counts) if counts else ids.numel(), 0)


def sent(is_async: bool, *tensors: Tensor) -> list[Tensor]:
    """What kernels may read, also after the op that starts them."""
    return [private(t) if is_async else t.contiguous() for t in tensors]


def wait_for(event: Any, is_async: bool) -> None:
    """Lets the current stream wait for kernels that it does not wait for already."""
    if is_async:
        event.current_stream_wait()


@torch.library.custom_op("moe_compile::deep_ep_combine", mutates_args=())
def deep_ep_combine(
    y: Tensor, weights: Tensor | None, handle: list[Tensor], group: str
) -> tuple[Tensor, Tensor]:
    """Return rows y [U, H], and weights [U, K] where given, and sum those of each token.

    Returns:
        [T, H] and [T, K], or [0, 0] without weights. Sums are in float32.
    """
    results: Any = begin_combine(y, weights, handle, group)()
    return results


def begin_combine(
    y: Tensor, weights: Tensor | None, handle: list[Tensor], group: str, *, is_async: bool = False
) -> Land:
    """Starts the kernels of a combine; the rest is all that `deep_ep_combine` returns."""
    # DeepEP writes into the heads of the queues, and an op must not change what it is given.
    own = (*sent(is_async, *handle[:5]), handle[5].clone())
    (rows,) = sent(is_async, y)
    weighed = None if weights is None else sent(is_async, weights.to(torch.float32))[0]
    buffer, _, config = _buffer(y.shape[1], group, _sms_of(handle))
    out, back, event = buffer.combine(
        rows, own, topk_weights=weighed, config=config, async_finish=is_async
    )

    def land() -> tuple[Tensor, ...]:
        wait_for(event, is_async)
        return out, y.new_empty(0, 0) if weights is None else back.to(weights.dtype)

    return land


@torch.library.custom_op("moe_compile::deep_ep_redispatch", mutates_args=())
def deep_ep_redispatch(g: Tensor, handle: list[Tensor], group: str) -> Tensor:
    """Send g [T, H] as dispatch sent x; returns [U, H]."""
    return begin_redispatch(g, handle, group)()[0]


def begin_redispatch(
    g: Tensor, handle: list[Tensor], group: str, *, is_async: bool = False
) -> Land:
    """Starts the kernels of a redispatch."""
    buffer, config, _ = _buffer(g.shape[1], group, _sms_of(handle))
    own = tuple(sent(is_async, *handle))
    rows, *_, event = buffer.dispatch(
        *sent(is_async, g), handle=own, config=config, async_finish=is_async
    )

    def land() -> tuple[Tensor, ...]:
        wait_for(event, is_async)
        return (rows,)

    return land


def _sms_of(handle: list[Tensor]) -> int:
    """What dispatch had: a channel is two SMs, one that sends and one that receives."""
    return 2 * handle[1].shape[1]


def unknown_sizes(ranks: int, picks: Any, max_tokens: int | None) -> tuple[Any, Any]:
    """U and P for an operator without data."""
    if max_tokens is not None:
        return max_tokens * ranks, max_tokens * ranks * picks
    context = torch.library.get_ctx()
    return context.new_dynamic_size(), context.new_dynamic_size()


def unknown_channels(max_tokens: int | None) -> Any:
    """C for an operator without data, of the library's own number of SMs."""
    if max_tokens is not None:
        return library().Buffer.num_sms // 2
    return torch.library.get_ctx().new_dynamic_size()


@deep_ep_dispatch.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
    sms: int | None = None,
) -> Any:
    ranks, tokens = process_group(group).size(), x.shape[0]
    rows, places = unknown_sizes(ranks, ids.shape[1], max_tokens)
    channels = unknown_channels(max_tokens) if sms is None else sms // 2
    new = functools.partial(ids.new_empty, dtype=torch.int32)
    return (
        x.new_empty(rows, x.shape[1]),
        ids.new_empty(rows, ids.shape[1]),
        weights.new_empty(rows, weights.shape[1]),
        x.new_empty(places, 0),
        new((ranks, ranks)),
        new((ranks, channels)),
        new((ranks, channels)),
        new((rows,)),
        ids.new_empty((tokens, ranks), dtype=torch.bool),
        new((tokens, ranks)),
    )


def complete(dispatch: Any, combine: Any, redispatch: Any) -> None:
    """Give three ops the fakes that they share, and the two backwards.

    Tensor 3 of their handle has a row for each of the U rows, tensor 5 one for each of T tokens.
    """

    @combine.register_fake
    def _(y: Tensor, weights: Tensor | None, handle: list[Tensor], group: str) -> Any:
        tokens = handle[5].shape[0]
        if weights is None:
            return y.new_empty(tokens, y.shape[1]), y.new_empty(0, 0)
        return y.new_empty(tokens, y.shape[1]), weights.new_empty(tokens, weights.shape[1])

    @redispatch.register_fake
    def _(g: Tensor, handle: list[Tensor], group: str) -> Tensor:
        return g.new_empty(handle[3].shape[0], g.shape[1])

    def dispatch_backward(ctx: Any, rows: Tensor, _: Any, weights: Tensor, *__: Any) -> Any:
        grads = combine(rows, weights, list(ctx.saved_tensors), ctx.group)
        return grads[0], None, grads[1], *[None] * (ctx.num_inputs - 3)

    def combine_backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        handle = list(ctx.saved_tensors)
        return redispatch(grad, handle, ctx.group), None, [None] * len(handle), None

    dispatch.register_autograd(dispatch_backward, setup_context=_save_dispatch)
    combine.register_autograd(combine_backward, setup_context=_save_combine)


def _save_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.group, ctx.num_inputs = inputs[4], len(inputs)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(output[1], *output[3:])


def _save_combine(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, handle, ctx.group = inputs
    ctx.save_for_backward(*handle)
    ctx.mark_non_differentiable(output[1])


complete(deep_ep_dispatch, deep_ep_combine, deep_ep_redispatch)

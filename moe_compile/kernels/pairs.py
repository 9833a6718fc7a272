"""Dispatch and combine of every dispatcher as pairs of start and wait, with their backwards.

A dispatcher gets six custom operators, a pair for each thing that travels. Rows, ids and weights
among a start's results are *stand-ins* (see `in_flight`), of which its wait makes the real ones:

    start_dispatch(x, ids, weights, num_experts, group, max_tokens, after)
        -> (done, rows, ids, weights, *known)
    wait_dispatch(rows, ids, weights, known, group, max_tokens, after)
        -> (done, rows, ids, weights, places, *arrived)
    start_combine(y, weights, handle, group, after) -> (done, y, weights)
    wait_combine(y, weights, handle, num_tokens, group, after) -> (done, out, weights)
    start_redispatch(g, handle, group, after) -> (done, g)
    wait_redispatch(g, num_rows, after) -> (done, rows)

The backward of a wait starts what travels the other way, and the backward of its start waits for
that; so what ran between a start and its wait has its backward between them, too. `done` and
`after` chain ops that do not depend on each other: a compiler may not change their order, which
must be the same on all ranks, and the backward runs through the chain from its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels import in_flight
from moe_compile.kernels.in_flight import Land, stand_in
from moe_compile.ops.canonical import CanonicalOp

Known = Sequence[Tensor]


@dataclass(frozen=True)
class Dispatcher:
    """How rows are sent, without waiting for them.

    Attributes:
        name: with which the names of its operators begin.
        begin_dispatch: of (x, ids, weights, num_experts, group, max_tokens), what is known of the
            handle at once, and what waits for rows [U, H], local ids [U, K], weights [U, K], places
            [P, 0] and for what of the handle arrives with them.
        begin_combine: of (y, weights or None, handle, group), what waits for the sums of each
            token, [T, H], and [T, K] or [0, 0].
        begin_redispatch: of (g, handle, group), what waits for rows [U, H].
        known, arrived: how many tensors these are.
        fake_known, fake_arrived: of the arguments of `start_dispatch` and `wait_dispatch`, those
            tensors without data; the latter with U and P before them.
        handle: of what was known and what arrived, what combine and redispatch need; tensor 3 of
            it has U rows.
    """

    name: str
    begin_dispatch: Callable[..., tuple[Known, Land]]
    begin_combine: Callable[..., Land]
    begin_redispatch: Callable[..., Land]
    known: int
    arrived: int
    fake_known: Callable[..., Known]
    fake_arrived: Callable[..., tuple[Any, Any, Known]]
    handle: Callable[[Known, Known], list[Tensor]]


def implementations(dispatcher: Dispatcher) -> dict[CanonicalOp[..., Any], Callable[..., Any]]:
    """Makes the six operators; returns what they are to a provider."""
    return _Pairs(dispatcher).implementations()


def _done(x: Tensor) -> Tensor:
    """What the next op of a chain takes as its `after`."""
    return torch.empty(1, dtype=torch.float32, device=x.device)


def _none(y: Tensor) -> Tensor:
    return y.new_empty(0, 0)


class _Pairs:
    """The operators of a dispatcher; their attributes are what `torch.library` returned."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.by = dispatcher
        known, arrived = (", Tensor" * n for n in (dispatcher.known, dispatcher.arrived))
        self.start_dispatch = self._op(
            "start_dispatch",
            self._begin_dispatch,
            "Tensor x, Tensor ids, Tensor weights, SymInt num_experts, str group, "
            f"SymInt? max_tokens, Tensor? after) -> (Tensor, Tensor, Tensor, Tensor{known}",
            self._fake_start_dispatch,
        )
        self.wait_dispatch = self._op(
            "wait_dispatch",
            self._end_dispatch,
            "Tensor x, Tensor ids, Tensor weights, Tensor[] known, str group, "
            "SymInt? max_tokens, Tensor? after) "
            f"-> (Tensor, Tensor, Tensor, Tensor, Tensor{arrived}",
            self._fake_wait_dispatch,
        )
        self.start_combine = self._op(
            "start_combine",
            self._begin_combine,
            "Tensor y, Tensor? weights, Tensor[] handle, str group, Tensor? after) "
            "-> (Tensor, Tensor, Tensor",
            _fake_start_combine,
        )
        self.wait_combine = self._op(
            "wait_combine",
            _end_combine,
            "Tensor y, Tensor? weights, Tensor[] handle, SymInt num_tokens, str group, "
            "Tensor? after) -> (Tensor, Tensor, Tensor",
            _fake_wait_combine,
        )
        self.start_redispatch = self._op(
            "start_redispatch",
            self._begin_redispatch,
            "Tensor g, Tensor[] handle, str group, Tensor? after) -> (Tensor, Tensor",
            lambda g, handle, group, after: (_done(g), stand_in(g)),
        )
        self.wait_redispatch = self._op(
            "wait_redispatch",
            lambda g, num_rows, after: (_done(g), *in_flight.take(g)),
            "Tensor g, SymInt num_rows, Tensor? after) -> (Tensor, Tensor",
            lambda g, num_rows, after: (_done(g), g.new_empty(num_rows, g.shape[1])),
        )
        for op, backward, save in (
            (self.start_dispatch, self._return_lands, _save_start_dispatch),
            (self.wait_dispatch, self._return_sets_off, self._save_wait_dispatch),
            (self.start_combine, self._redispatch_lands, _save_start_combine),
            (self.wait_combine, self._redispatch_sets_off, _save_wait_combine),
        ):
            op.register_autograd(backward, setup_context=save)

    def _op(self, name: str, run: Any, schema: str, fake: Any) -> Any:
        full = f"moe_compile::{self.by.name}_{name}"
        op: Any = torch.library.custom_op(full, run, mutates_args=(), schema=f"({schema})")
        op.register_fake(fake)
        return op

    def implementations(self) -> dict[CanonicalOp[..., Any], Callable[..., Any]]:
        return {
            ops.start_dispatch: self.start,
            ops.wait_dispatch: self.wait,
            ops.start_combine: self.start_back,
            ops.wait_combine: self.wait_back,
        }

    # What a provider computes the canonical ops with; the lists are those of the graph.

    def start(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        num_experts: int,
        group: str,
        max_tokens: int | None = None,
        after: Tensor | None = None,
    ) -> list[Tensor]:
        return list(self.start_dispatch(x, ids, weights, num_experts, group, max_tokens, after))

    def wait(
        self,
        flight: list[Tensor],
        group: str,
        max_tokens: int | None = None,
        after: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        stand_ins, known = flight[1:4], flight[4:]
        given = *stand_ins, known, group, max_tokens, after
        done, rows, ids, weights, places, *arrived = self.wait_dispatch(*given)
        return rows, ids, weights, places, self.by.handle(known, arrived), done

    def start_back(
        self,
        y: Tensor,
        handle: list[Tensor],
        num_tokens: int,
        group: str,
        after: Tensor | None = None,
    ) -> list[Tensor]:
        done, stand, _ = self.start_combine(y, None, handle, group, after)
        return [done, stand, *handle]

    def wait_back(
        self, flight: list[Tensor], num_tokens: int, group: str, after: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        stand, handle = flight[1], flight[2:]
        done, out, _ = self.wait_combine(stand, None, handle, num_tokens, group, after)
        return out, done

    # What the operators do.

    def _begin_dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, *others: Any
    ) -> tuple[Tensor, ...]:
        known, land = self.by.begin_dispatch(x, ids, weights, *others[:-1])
        stand = stand_in(x)
        in_flight.put(stand, land)
        return _done(x), stand, stand_in(ids), stand_in(weights), *known

    def _end_dispatch(self, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return _done(x), *in_flight.take(x)

    def _begin_combine(
        self, y: Tensor, weights: Tensor | None, handle: Known, group: str, after: Tensor | None
    ) -> tuple[Tensor, ...]:
        stand = stand_in(y)
        in_flight.put(stand, self.by.begin_combine(y, weights, handle, group))
        return _done(y), stand, _none(y) if weights is None else stand_in(weights)

    def _begin_redispatch(
        self, g: Tensor, handle: Known, group: str, after: Tensor | None
    ) -> tuple[Tensor, ...]:
        stand = stand_in(g)
        in_flight.put(stand, self.by.begin_redispatch(g, handle, group))
        return _done(g), stand

    def _fake_start_dispatch(self, x: Tensor, ids: Tensor, weights: Tensor, *others: Any) -> Any:
        known = self.by.fake_known(x, ids, weights, *others)
        return _done(x), stand_in(x), stand_in(ids), stand_in(weights), *known

    def _fake_wait_dispatch(self, x: Tensor, ids: Tensor, weights: Tensor, *others: Any) -> Any:
        rows, places, arrived = self.by.fake_arrived(x, ids, weights, *others)
        here = (t.new_empty(rows, t.shape[1]) for t in (x, ids, weights))
        return _done(x), *here, x.new_empty(places, 0), *arrived

    # The backwards: what travels the other way.

    def _return_sets_off(
        self, ctx: Any, after: Tensor, rows: Tensor, _: Any, weights: Tensor, *__: Any
    ) -> Any:
        handle = list(ctx.saved_tensors)
        sent = self.start_combine(rows, weights, handle, ctx.group, after)
        return sent[1], None, sent[2], [None] * self.by.known, None, None, _first(sent, ctx)

    def _return_lands(
        self, ctx: Any, after: Tensor, rows: Tensor, _: Any, weights: Tensor, *__: Any
    ) -> Any:
        known = list(ctx.saved_tensors)
        back = self.wait_combine(rows, weights, known, ctx.num_tokens, ctx.group, after)
        return back[1], None, back[2], None, None, None, _first(back, ctx)

    def _redispatch_sets_off(self, ctx: Any, after: Tensor, grad: Tensor, _: Any) -> Any:
        handle = list(ctx.saved_tensors)
        sent = self.start_redispatch(grad, handle, ctx.group, after)
        return sent[1], None, [None] * len(handle), None, None, _first(sent, ctx)

    def _redispatch_lands(self, ctx: Any, after: Tensor, rows: Tensor, _: Any) -> Any:
        back = self.wait_redispatch(rows, ctx.num_rows, after)
        return back[1], None, [None] * ctx.num_handle, None, _first(back, ctx)

    def _save_wait_dispatch(self, ctx: Any, inputs: Any, output: Any) -> None:
        _, _, _, known, ctx.group, _, after = inputs
        ctx.is_chained = after is not None
        ctx.save_for_backward(*self.by.handle(known, output[5:]))
        ctx.mark_non_differentiable(output[2], *output[4:])


def _end_combine(y: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _done(y), *in_flight.take(y)


def _fake_start_combine(
    y: Tensor, weights: Tensor | None, handle: Known, group: str, after: Tensor | None
) -> Any:
    return _done(y), stand_in(y), _none(y) if weights is None else stand_in(weights)


def _fake_wait_combine(
    y: Tensor,
    weights: Tensor | None,
    handle: Known,
    num_tokens: int,
    group: str,
    after: Tensor | None,
) -> Any:
    back = _none(y) if weights is None else weights.new_empty(num_tokens, weights.shape[1])
    return _done(y), y.new_empty(num_tokens, y.shape[1]), back


def _first(results: tuple[Tensor, ...], ctx: Any) -> Tensor | None:
    """The gradient of `after`, which may not have been given."""
    return results[0] if ctx.is_chained else None


def _save_start_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, _, ctx.group, _, after = inputs
    ctx.num_tokens, ctx.is_chained = x.shape[0], after is not None
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(output[2], *output[4:])


def _save_start_combine(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, handle, _, after = inputs
    # Not y's own: a recomputed layer would compute it again to learn its size.
    ctx.num_rows = handle[3].shape[0]
    ctx.num_handle, ctx.is_chained = len(handle), after is not None
    ctx.mark_non_differentiable(output[2])


def _save_wait_combine(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, handle, _, ctx.group, after = inputs
    ctx.is_chained = after is not None
    ctx.save_for_backward(*handle)
    ctx.mark_non_differentiable(output[2])

"""What the start and wait ops of all dispatchers have in common: their fakes and backwards.

A dispatcher has six custom operators, a pair for each thing that travels:

    start_dispatch(x, ids, weights, num_experts, group, max_tokens, after)
        -> (done, rows, ids, weights, *known)         three stand-ins; what is known of the handle
    wait_dispatch(rows, ids, weights, known, group, after) -> (done, rows, ids, weights, *arrived)
    start_combine(y, weights, handle, group, after) -> (done, y, weights)            two stand-ins
    wait_combine(y, weights, handle, num_tokens, group, after) -> (done, out, weights)
    start_redispatch(g, handle, group, after) -> (done, g)                            one stand-in
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
from moe_compile.ops.canonical import CanonicalOp

Known = Sequence[Tensor]


def done(x: Tensor) -> Tensor:
    """What the next op of a chain takes as its `after`."""
    return torch.empty(1, dtype=torch.float32, device=x.device)


@dataclass(frozen=True)
class Pairs:
    """The six custom operators of a dispatcher.

    `handle` puts together what combine needs of what was known at the start of a dispatch, and of
    what arrived with the rows.
    """

    start_dispatch: Any
    wait_dispatch: Any
    start_combine: Any
    wait_combine: Any
    start_redispatch: Any
    wait_redispatch: Any
    handle: Callable[[Known, Known], list[Tensor]]

    def implementations(self) -> dict[CanonicalOp[..., Any], Callable[..., Any]]:
        """What they are to a provider, by canonical op."""
        return {
            ops.start_dispatch: self._start_dispatch,
            ops.wait_dispatch: self._wait_dispatch,
            ops.start_combine: self._start_combine,
            ops.wait_combine: self._wait_combine,
        }

    def complete(self) -> None:
        """Gives four ops their backwards; the other two run in these alone."""
        for op, backward, save in (
            (self.start_dispatch, self._return_lands, _save_start_dispatch),
            (self.wait_dispatch, self._return_sets_off, self._save_wait_dispatch),
            (self.start_combine, self._redispatch_lands, _save_start_combine),
            (self.wait_combine, self._redispatch_sets_off, _save_wait_combine),
        ):
            op.register_autograd(backward, setup_context=save)
        self.start_combine.register_fake(_started_combine)
        self.wait_combine.register_fake(_waited_combine)
        self.start_redispatch.register_fake(_started_redispatch)
        self.wait_redispatch.register_fake(_waited_redispatch)

    def _start_dispatch(
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

    def _wait_dispatch(
        self, flight: list[Tensor], group: str, after: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        _, *stand_ins = flight[:4]
        known = flight[4:]
        done, rows, ids, weights, *arrived = self.wait_dispatch(*stand_ins, known, group, after)
        return rows, ids, weights, self.handle(known, arrived), done

    def _start_combine(
        self,
        y: Tensor,
        handle: list[Tensor],
        num_tokens: int,
        group: str,
        after: Tensor | None = None,
    ) -> list[Tensor]:
        done, stand, _ = self.start_combine(y, None, handle, group, after)
        return [done, stand, *handle]

    def _wait_combine(
        self, flight: list[Tensor], num_tokens: int, group: str, after: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _, stand, *handle = flight
        done, out, _ = self.wait_combine(stand, None, handle, num_tokens, group, after)
        return out, done

    def _return_sets_off(
        self, ctx: Any, after: Tensor, rows: Tensor, _: Any, weights: Tensor, *__: Any
    ) -> Any:
        handle = list(ctx.saved_tensors)
        sent = self.start_combine(rows, weights, handle, ctx.group, after)
        return sent[1], None, sent[2], [None] * ctx.num_known, None, _first(sent, ctx)

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
        _, _, _, known, ctx.group, after = inputs
        ctx.num_known, ctx.is_chained = len(known), after is not None
        ctx.save_for_backward(*self.handle(known, output[4:]))
        ctx.mark_non_differentiable(output[2], *output[4:])


def _first(results: tuple[Tensor, ...], ctx: Any) -> Tensor | None:
    """The gradient of `after`, which may not have been given."""
    return results[0] if ctx.is_chained else None


def _save_start_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, _, ctx.group, _, after = inputs
    ctx.num_tokens, ctx.is_chained = x.shape[0], after is not None
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(output[2], *output[4:])


def _save_start_combine(ctx: Any, inputs: Any, output: Any) -> None:
    y, _, handle, _, after = inputs
    ctx.num_rows, ctx.num_handle, ctx.is_chained = y.shape[0], len(handle), after is not None
    ctx.mark_non_differentiable(output[2])


def _save_wait_combine(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, handle, _, ctx.group, after = inputs
    ctx.is_chained = after is not None
    ctx.save_for_backward(*handle)
    ctx.mark_non_differentiable(output[2])


def _started_combine(
    y: Tensor, weights: Tensor | None, handle: Known, group: str, after: Tensor | None
) -> Any:
    none = y.new_empty(0, 0) if weights is None else weights.new_empty(1, weights.shape[1])
    return done(y), y.new_empty(1, y.shape[1]), none


def _waited_combine(
    y: Tensor,
    weights: Tensor | None,
    handle: Known,
    num_tokens: int,
    group: str,
    after: Tensor | None,
) -> Any:
    none = y.new_empty(0, 0)
    back = none if weights is None else weights.new_empty(num_tokens, weights.shape[1])
    return done(y), y.new_empty(num_tokens, y.shape[1]), back


def _started_redispatch(g: Tensor, handle: Known, group: str, after: Tensor | None) -> Any:
    return done(g), g.new_empty(1, g.shape[1])


def _waited_redispatch(g: Tensor, num_rows: int, after: Tensor | None) -> Any:
    return done(g), g.new_empty(num_rows, g.shape[1])

"""Starts and waits of every dispatcher: what their ops in one piece give, and in which order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_compile import ops
from moe_compile.install.keep import keeping
from moe_compile.install.recompute import KEPT, _keeps
from moe_compile.kernels import in_flight
from moe_compile.providers.all_to_all import AllToAllProvider
from moe_compile.providers.provider import Provider
from moe_compile.providers.torch import TorchProvider
from tests.counting import CountOps
from tests.kernels.dispatching import CASES, EXPERTS, group, parameters, tokens_of
from tests.ranks import on_ranks

Program = Callable[..., Tensor]

compute = partial(TorchProvider().implementation(ops.experts), activation=torch.tanh)


def whole(provider: Provider) -> Program:
    send, bring = (provider.implementation(op) for op in (ops.dispatch, ops.combine))

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, beside: Tensor, ids: Tensor) -> Any:
        rows, theirs, weighed, handle = send(x, ids, weights, EXPERTS, group())
        y = compute(rows, theirs, weighed, up, down)
        return bring(y, handle, x.shape[0], group()) + x @ beside

    return run


def paired(provider: Provider) -> Program:
    start, wait, send_back, take_back = pair_of(provider)

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, beside: Tensor, ids: Tensor) -> Any:
        flight = start(x, ids, weights, EXPERTS, group())
        other = x @ beside
        rows, theirs, weighed, handle, _ = wait(flight, group())
        y = compute(rows, theirs, weighed, up, down)
        flight = send_back(y, handle, x.shape[0], group())
        return take_back(flight, x.shape[0], group())[0] + other

    return run


def chained(provider: Provider) -> Program:
    """Two chunks; every op comes after the one before it."""
    start, wait, send_back, take_back = pair_of(provider)

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, beside: Tensor, ids: Tensor) -> Any:
        first = x.shape[0] // 2
        sizes, after = [first, x.shape[0] - first], None
        chunks = list(zip(x.split(sizes), ids.split(sizes), weights.split(sizes), strict=True))
        flights: list[Any] = []
        for tokens, picks, weighed in chunks:
            flights.append(start(tokens, picks, weighed, EXPERTS, group(), after=after))
            after = flights[-1][0]
        back: list[Any] = []
        for flight, size in zip(flights, sizes, strict=True):
            rows, theirs, weighed, handle, after = wait(flight, group(), after)
            y = compute(rows, theirs, weighed, up, down)
            back.append(send_back(y, handle, size, group(), after))
            after = back[-1][0]
        outs: list[Tensor] = []
        for flight, size in zip(back, sizes, strict=True):
            out, after = take_back(flight, size, group(), after)
            outs.append(out)
        return torch.cat(outs) + x @ beside

    return run


def pair_of(provider: Provider) -> tuple[Any, ...]:
    names = ops.start_dispatch, ops.wait_dispatch, ops.start_combine, ops.wait_combine
    return tuple(map(provider.implementation, names))


def recomputed(program: Program, mode: str) -> Program:
    contexts = partial(keeping, partial(_keeps, KEPT[mode]))

    def run(*inputs: Tensor) -> Any:
        return checkpoint(program, *inputs, use_reentrant=False, context_fn=contexts)

    return run


def results(program: Program, case: str, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    up, down = parameters(hidden, dtype)
    x, ids, weights = tokens_of(case, rank, hidden, dtype)
    beside = torch.eye(hidden, dtype=dtype) * 0.5
    leaves = [t.clone().requires_grad_() for t in (x, weights.to(dtype), up[mine], down[mine], beside)]
    out = program(*leaves, ids)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def compiled(program: Program) -> Program:
    return torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)


def check(provider: Provider, hidden: int, dtype: torch.dtype) -> None:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    pair, chain = paired(provider), chained(provider)
    kept = [recomputed(program, mode) for program in (pair, chain) for mode in KEPT]
    for case in CASES:
        want = results(whole(provider), case, hidden, dtype)
        for program in (pair, compiled(pair), kept[0], kept[1]):
            got = results(program, case, hidden, dtype)
            assert all(map(torch.equal, got, want)), case
        for program in (chain, compiled(chain), kept[2], kept[3]):
            torch.testing.assert_close(results(program, case, hidden, dtype), want)
        assert in_flight.count() == 0


def check_all_to_all() -> None:
    check(AllToAllProvider(), 8, torch.float64)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_all_to_all(ranks: int) -> None:
    on_ranks(ranks, check_all_to_all)



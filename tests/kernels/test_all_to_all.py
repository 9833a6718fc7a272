"""Dispatch and combine on two ranks against dense experts; the gradients are summed over ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moe_compile.kernels.all_to_all import (
    all_to_all_combine,
    all_to_all_dispatch,
    all_to_all_redispatch,
)
from moe_compile.ops import experts
from moe_compile.providers.torch import TorchProvider
from tests.kernels.dispatching import CASES, EXPERTS, dense, group, parameters, tokens_of
from tests.ranks import on_ranks

HIDDEN, DTYPE = 8, torch.float64


def parallel(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    *arrived, places, source, splits, came = all_to_all_dispatch(x, ids, weights, EXPERTS, group())
    compute = TorchProvider().implementation(experts)
    y = compute(*arrived, up, down, torch.tanh, places=places)
    return all_to_all_combine(y, None, source, splits, came, x.shape[0], group())[0]


def recomputed(*inputs: Tensor) -> Any:
    return checkpoint(parallel, *inputs, use_reentrant=False)


def partly_recomputed(*inputs: Tensor) -> Any:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op in (
            torch.ops.moe_compile.all_to_all_dispatch.default,
            torch.ops.moe_compile.all_to_all_combine.default,
        )
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    context = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(parallel, *inputs, use_reentrant=False, context_fn=context)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "plain": parallel,
    "recomputed": recomputed,
    "partly recomputed": partly_recomputed,
}


def gradients(program: Callable[..., Any], *inputs: Tensor, ids: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = program(*leaves, ids)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def check(name: str, backend: str | None) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    program = PROGRAMS[name]
    if backend is not None:
        program = torch.compile(program, fullgraph=True, backend=backend, dynamic=True)
    mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    up, down = parameters(HIDDEN, DTYPE)
    for case in CASES:
        x, ids, weights = tokens_of(case, rank, HIDDEN, DTYPE)
        want = gradients(dense, x, weights, up, down, ids=ids)
        for gradient in want[3:]:
            dist.all_reduce(gradient)
        want[3:] = [gradient[mine] for gradient in want[3:]]
        got = gradients(program, x, weights, up[mine], down[mine], ids=ids)
        torch.testing.assert_close(got, want, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_dense_experts(name: str, ranks: int) -> None:
    on_ranks(ranks, check, name, None)


@pytest.mark.parametrize(
    "name",
    [
        "recomputed",
        *(pytest.param(n, marks=pytest.mark.matrix) for n in PROGRAMS if n != "recomputed"),
    ],
)
def test_compiled_without_a_graph_break(name: str) -> None:
    on_ranks(2, check, name, "aot_eager")


@pytest.mark.matrix
@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    on_ranks(2, check, "plain", "inductor")


def rows_sent(case: str) -> tuple[int, int]:
    """The rows sent to other ranks, and the (token, other rank) pairs that need one."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, ids, weights = tokens_of(case, rank, HIDDEN, DTYPE)
    send, away = dist.all_to_all_single, [0]

    def count(out: Tensor, x: Tensor, received: Any = None, sent: Any = None, **group: Any) -> Any:
        if x.shape[1:] == (HIDDEN,):
            away[0] += sum(sent) - sent[rank]
        return send(out, x, received, sent, **group)

    dist.all_to_all_single = count
    all_to_all_dispatch(x, ids, weights, EXPERTS, group())
    dist.all_to_all_single = send
    owners = [{int(i) // (EXPERTS // ranks) for i in row if i >= 0} - {rank} for row in ids]
    return away[0], sum(map(len, owners))


def rows_sent_in_every_case() -> dict[str, tuple[int, int]]:
    return {case: rows_sent(case) for case in CASES}


def test_a_token_travels_once_to_each_rank() -> None:
    found = on_ranks(4, rows_sent_in_every_case)
    for case in CASES:
        for sent, needed in (each[case] for each in found):
            assert sent == needed, case
    assert sum(sent for each in found for sent, _ in each.values()) > 0


def check_local_ids() -> None:
    local = EXPERTS // dist.get_world_size()
    for case in CASES:
        x, ids, weights = tokens_of(case, dist.get_rank(), HIDDEN, DTYPE)
        _, theirs, _, places, *_ = all_to_all_dispatch(x, ids, weights, EXPERTS, group())
        assert places.shape == ((theirs >= 0).sum(), 0), case
        assert bool(((theirs >= -1) & (theirs < local)).all()), case
        assert bool((theirs >= 0).any(dim=1).all()), case


def test_ids_are_those_of_this_rank_and_every_row_has_one() -> None:
    on_ranks(2, check_local_ids)


def opcheck() -> None:
    x, ids, weights = tokens_of("even", 0, HIDDEN, DTYPE)
    x.requires_grad_()
    weights.requires_grad_()
    rows, _, _, _, *handle = all_to_all_dispatch(x, ids, weights, EXPERTS, group())
    y = rows.detach().requires_grad_()
    torch.library.opcheck(all_to_all_dispatch, (x, ids, weights, EXPERTS, group()))
    torch.library.opcheck(all_to_all_combine, (y, None, *handle, len(x), group()))
    torch.library.opcheck(all_to_all_combine, (y.detach(), weights.detach(), *handle, 6, group()))
    torch.library.opcheck(all_to_all_redispatch, (x.detach(), *handle, group()))


def test_opcheck() -> None:
    on_ranks(1, opcheck)

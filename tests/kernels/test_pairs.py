"""Starts and waits of every dispatcher: what their ops in one piece give, and in which order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_compile import ops
from moe_compile.install.keep import keeping
from moe_compile.install.recompute import KEPT, _keeps
from moe_compile.kernels import in_flight
from moe_compile.kernels.deep_ep import destroy_buffers
from moe_compile.providers.all_to_all import AllToAllProvider
from moe_compile.providers.deepep import DeepEPProvider
from moe_compile.providers.provider import Provider
from moe_compile.providers.torch import TorchProvider
from tests import deep_ep_elastic_emulator, deep_ep_emulator
from tests.kernels.dispatching import CASES, EXPERTS, group, parameters, tokens_of
from tests.pairs import error
from tests.ranks import on_ranks

Program = Callable[..., Tensor]
MOST = 53  # of the tokens that a rank brings in any case, on two ranks

compute = partial(TorchProvider().implementation(ops.experts), activation=torch.tanh)


def whole(provider: Provider, bound: int | None = None) -> Program:
    send, bring = (provider.implementation(op) for op in (ops.dispatch, ops.combine))

    def run(
        x: Tensor, weights: Tensor, up: Tensor, down: Tensor, beside: Tensor, ids: Tensor
    ) -> Any:
        *arrived, places, handle = send(x, ids, weights, EXPERTS, group(), bound)
        y = compute(*arrived, up, down, places=places)
        return bring(y, handle, x.shape[0], group()) + x @ beside

    return run


def paired(provider: Provider, bound: int | None = None) -> Program:
    start, wait, send_back, take_back = pair_of(provider)

    def run(
        x: Tensor, weights: Tensor, up: Tensor, down: Tensor, beside: Tensor, ids: Tensor
    ) -> Any:
        flight = start(x, ids, weights, EXPERTS, group(), bound)
        other = x @ beside
        *arrived, places, handle, _ = wait(flight, group(), bound)
        y = compute(*arrived, up, down, places=places)
        flight = send_back(y, handle, x.shape[0], group())
        return take_back(flight, x.shape[0], group())[0] + other

    return run


def chained(provider: Provider, bound: int | None = None) -> Program:
    """Two chunks; every op comes after the one before it."""
    start, wait, send_back, take_back = pair_of(provider)

    def run(
        x: Tensor, weights: Tensor, up: Tensor, down: Tensor, beside: Tensor, ids: Tensor
    ) -> Any:
        first = x.shape[0] // 2
        sizes, after = [first, x.shape[0] - first], None
        chunks = list(zip(x.split(sizes), ids.split(sizes), weights.split(sizes), strict=True))
        flights: list[Any] = []
        for tokens, picks, weighed in chunks:
            flights.append(start(tokens, picks, weighed, EXPERTS, group(), bound, after))
            after = flights[-1][0]
        back: list[Any] = []
        for flight, size in zip(flights, sizes, strict=True):
            *arrived, places, handle, after = wait(flight, group(), bound, after)
            y = compute(*arrived, up, down, places=places)
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
    inputs = x, weights.to(dtype), up[mine], down[mine], beside
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = program(*leaves, ids)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def compiled(program: Program) -> Program:
    return torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)


def check(
    provider: Provider,
    hidden: int,
    dtype: torch.dtype,
    bound: int | None = None,
    *,
    also_compiled: bool,
) -> None:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    pair, chain = paired(provider, bound), chained(provider, bound)
    same, near = [pair], [chain]
    for mode in KEPT:
        same.append(recomputed(pair, mode))
        near.append(recomputed(chain, mode))
    for case in CASES:
        want = results(whole(provider, bound), case, hidden, dtype)
        for program in same:
            assert all(map(torch.equal, results(program, case, hidden, dtype), want)), case
        for program in near:
            check_near(results(program, case, hidden, dtype), want)
    if also_compiled:
        program = compiled(chain)
        for case in ("uneven", "one rank has no tokens"):
            want = results(whole(provider, bound), case, hidden, dtype)
            check_near(results(program, case, hidden, dtype), want)
    assert in_flight.count() == 0


def check_reuse(provider: Provider, hidden: int, dtype: torch.dtype, bound: int | None) -> None:
    """A compiler may put something else where arguments were, as soon as a start has returned."""
    start, wait, send_back, take_back = pair_of(provider)
    inputs = tokens_of("uneven", dist.get_rank(), hidden, dtype)
    x, ids, weights = (t.clone() for t in inputs)
    tokens = x.shape[0]
    flight = start(x, ids, weights, EXPERTS, group(), bound)
    for t in (x, ids, weights):
        t.fill_(3)
    rows, theirs, _, _, handle, _ = wait(flight, group(), bound)
    came = theirs[:, 0] >= -1 if bound is None else (theirs >= 0).any(1)
    y = rows.masked_fill(~came[:, None], 0)
    flight = send_back(y, handle, tokens, group())
    y.fill_(3)
    out, _ = take_back(flight, tokens, group())
    copies = (inputs[1] // (EXPERTS // dist.get_world_size())).sort(1).values.diff(dim=1).ne(0)
    torch.testing.assert_close(out, inputs[0] * (1 + copies.sum(1, keepdim=True)).to(dtype))


def check_near(values: list[Tensor], references: list[Tensor]) -> None:
    """Chunks sum the experts' gradients in another order."""
    limit = 4 * torch.finfo(values[0].dtype).eps
    assert all(error(v, r) < limit for v, r in zip(values, references, strict=True))


def check_all_to_all() -> None:
    check(AllToAllProvider(), 8, torch.float64, also_compiled=True)
    check_order(AllToAllProvider())
    check_reuse(AllToAllProvider(), 8, torch.float64, None)


def check_deep_ep(interface: str, bound: int | None) -> None:
    emulator = {"Buffer": deep_ep_emulator, "ElasticBuffer": deep_ep_elastic_emulator}[interface]
    emulator.install()
    check(DeepEPProvider(), 256, torch.bfloat16, bound, also_compiled=True)
    check_reuse(DeepEPProvider(), 256, torch.bfloat16, bound)
    destroy_buffers()


NAMES = [
    "all_to_all_start_dispatch",
    "all_to_all_wait_dispatch",
    "all_to_all_start_combine",
    "all_to_all_wait_combine",
    "all_to_all_start_redispatch",
    "all_to_all_wait_redispatch",
]


class Order(TorchDispatchMode):
    """The starts and waits that run inside, and the products beside the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        self.names += [name.removeprefix("all_to_all_")] if name in (*NAMES, "mm") else []
        return func(*args, **(kwargs or {}))


def check_order(provider: Provider) -> None:
    """In the backward, what ran between a start and its wait runs between those of the way back."""
    with Order() as pair:
        results(paired(provider), "uneven", 8, torch.float64)
    assert pair.names == [
        *("start_dispatch", "mm", "wait_dispatch", "start_combine", "wait_combine"),
        *("start_redispatch", "wait_redispatch", "start_combine", "mm", "mm", "wait_combine"),
    ]
    with Order() as chain:
        results(chained(provider), "uneven", 8, torch.float64)
    back = [name for name in chain.names if name != "mm"]
    assert back == [
        *("start_dispatch", "start_dispatch"),
        *("wait_dispatch", "start_combine", "wait_dispatch", "start_combine"),
        *("wait_combine", "wait_combine", "start_redispatch", "start_redispatch"),
        *("wait_redispatch", "start_combine", "wait_redispatch", "start_combine"),
        *("wait_combine", "wait_combine"),
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_all_to_all(ranks: int) -> None:
    on_ranks(ranks, check_all_to_all)


@pytest.mark.parametrize(
    ("interface", "bound"),
    [
        ("Buffer", None),
        ("ElasticBuffer", MOST),
        pytest.param("Buffer", MOST, marks=pytest.mark.matrix),
        pytest.param("ElasticBuffer", None, marks=pytest.mark.matrix),
    ],
)
def test_deep_ep_whose_results_are_garbage_until_they_are_waited_for(
    interface: str, bound: int | None
) -> None:
    on_ranks(2, check_deep_ep, interface, bound)


def lost_flights() -> None:
    x, ids, weights = tokens_of("even", dist.get_rank(), 8, torch.float64)
    start, wait, *_ = pair_of(AllToAllProvider())
    flight = start(x, ids, weights, EXPERTS, group())
    wait(flight, group())
    with pytest.raises(AssertionError, match="waited for once"):
        wait(flight, group())


def test_a_flight_is_waited_for_once() -> None:
    on_ranks(2, lost_flights)

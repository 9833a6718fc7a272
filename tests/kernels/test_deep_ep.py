"""DeepEP's ops, on emulations of both interfaces: against all_to_all bit for bit, and dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils.checkpoint import checkpoint

from moe_compile.kernels import deep_ep
from moe_compile.kernels.deep_ep import (
    AHEAD,
    deep_ep_combine,
    deep_ep_dispatch,
    deep_ep_redispatch,
    destroy_buffers,
)
from moe_compile.ops import combine, dispatch, experts
from moe_compile.providers.all_to_all import AllToAllProvider
from moe_compile.providers.deepep import DeepEPProvider
from moe_compile.providers.provider import Provider
from moe_compile.providers.torch import TorchProvider
from tests import deep_ep_elastic_emulator, deep_ep_emulator
from tests.kernels.dispatching import CASES, EXPERTS, dense, group, parameters, tokens_of
from tests.pairs import error
from tests.ranks import on_ranks

HIDDEN, DTYPE = 256, torch.bfloat16
LIMIT = 0.02  # bfloat16, summed in another order than one process would
MOST = 53  # of the tokens that a rank brings in any case, on two ranks

Program = Callable[..., Tensor]
EMULATORS = {"Buffer": deep_ep_emulator, "ElasticBuffer": deep_ep_elastic_emulator}

both = pytest.mark.parametrize("interface", EMULATORS)
each = pytest.mark.parametrize(
    ("interface", "bound"),
    [
        ("Buffer", None),
        ("ElasticBuffer", MOST),
        pytest.param("Buffer", MOST, marks=pytest.mark.matrix),
        pytest.param("ElasticBuffer", None, marks=pytest.mark.matrix),
    ],
)


def tokens_with(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a case; their weights are bfloat16 or float32."""
    x, ids, weights = tokens_of(case, rank, HIDDEN, DTYPE)
    return x, ids, weights.to(DTYPE if case == "even" else torch.float32)


def parallel(provider: Provider, bound: int | None = None) -> Program:
    send, bring = provider.implementation(dispatch), provider.implementation(combine)
    compute = TorchProvider().implementation(experts)

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
        *arrived, places, handle = send(x, ids, weights, EXPERTS, group(), bound)
        y = compute(*arrived, up, down, torch.tanh, places=places)
        out: Tensor = bring(y, handle, x.shape[0], group())
        return out

    return run


def recomputed(program: Program) -> Program:
    def run(*inputs: Tensor) -> Any:
        return checkpoint(program, *inputs, use_reentrant=False)

    return run


def gradients(program: Program, *inputs: Tensor, ids: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = program(*leaves, ids)
    generator = torch.Generator().manual_seed(3)
    # Not contiguous, as a gradient may be.
    cotangent = torch.randn(out.shape[::-1], generator=generator).to(out).T
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def check_case(case: str, program: Program, *, exact: bool = True) -> None:
    """`exact`: it computes what all_to_all does; Inductor may round less often."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    up, down = parameters(HIDDEN, DTYPE)
    x, ids, weights = tokens_with(case, rank)
    want = gradients(dense, *(t.double() for t in (x, weights, up, down)), ids=ids)
    for gradient in want[3:]:
        dist.all_reduce(gradient)
    want[3:] = [gradient[mine] for gradient in want[3:]]
    inputs = x, weights, up[mine], down[mine]
    got = gradients(program, *inputs, ids=ids)
    other = gradients(parallel(AllToAllProvider()), *inputs, ids=ids)
    for value, reference, same in zip(got, want, other, strict=True):
        assert value.dtype == same.dtype
        assert torch.equal(value, same) or not exact, case
        assert error(value, reference) < LIMIT, case


def check_programs(interface: str, bound: int | None) -> None:
    EMULATORS[interface].install()
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    plain = parallel(DeepEPProvider(), bound)
    programs = plain, recomputed(plain)
    compiled = [
        torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)
        for program in programs
    ]
    for program in (*programs, *compiled):
        for case in CASES:
            check_case(case, program)
    destroy_buffers()


def check_ops() -> None:
    deep_ep_emulator.install()
    deep_ep_emulator.Buffer.unwritten = 7.0  # two runs are compared
    for bound in (None, MOST):
        opcheck(bound)
    check_buffers()
    check_counts()
    destroy_buffers()


def check_buffers() -> None:
    """One buffer for the group; wider rows and more SMs make a larger one, narrower rows do not."""
    (first,) = deep_ep.BUFFERS.values()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for hidden, sms, is_new in (
        (128, 20, False),
        (512, 20, True),
        (512, 24, True),
        (256, 20, False),
    ):
        deep_ep_emulator.Buffer.set_num_sms(sms)
        x = torch.ones(1, hidden, dtype=torch.bfloat16)
        deep_ep_dispatch(x, ids, torch.ones(1, 1), EXPERTS, group())
        (last,) = deep_ep.BUFFERS.values()
        assert (last is not first) == is_new
        assert first.available != is_new
        first = last


def check_counts() -> None:
    """A dispatch that waits for its counts first waits for those that did not."""
    x, ids, weights = tokens_with("uneven", dist.get_rank())
    for bound in (None, MOST, MOST, None, None):
        deep_ep_dispatch(x, ids, weights, EXPERTS, group(), bound)
        assert (group() in AHEAD) == (bound is not None)


def opcheck(bound: int | None) -> None:
    x, ids, weights = tokens_with("uneven", dist.get_rank())
    x.requires_grad_()
    weights.requires_grad_()
    outputs = deep_ep_dispatch(x, ids, weights, EXPERTS, group(), bound)
    assert all(t.is_contiguous() and t.storage_offset() == 0 for t in outputs)
    picks = outputs[1].numel() if bound else int((outputs[1] >= 0).sum())
    assert outputs[3].shape == (picks, 0)
    handle, y = list(outputs[4:]), outputs[0].detach().requires_grad_()
    for sms in (None, 22):
        given = x, ids, weights, EXPERTS, group(), bound, sms
        torch.library.opcheck(deep_ep_dispatch, given)
    torch.library.opcheck(deep_ep_combine, (y, None, handle, group()))
    torch.library.opcheck(deep_ep_combine, (y.detach(), outputs[2].detach(), handle, group()))
    torch.library.opcheck(deep_ep_redispatch, (x.detach(), handle, group()))


def check_plain(interface: str) -> None:
    EMULATORS[interface].install()
    for case in CASES:
        check_case(case, parallel(DeepEPProvider()))


def check_inductor(interface: str, bound: int | None) -> None:
    EMULATORS[interface].install()
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    program = torch.compile(
        parallel(DeepEPProvider(), bound), fullgraph=True, backend="inductor", dynamic=True
    )
    check_case("uneven", program, exact=False)
    check_case("one rank has no tokens", program, exact=False)


def compiled_sizes(interface: str, bound: int | None) -> tuple[list[bool], int]:
    """Whether forward and backward graph have sizes that depend on data; and the rows."""
    EMULATORS[interface].install()
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    found: list[bool] = []

    def look(graph: fx.GraphModule, _: Any) -> Any:
        values = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
        found.append(bool(free_unbacked_symbols(values)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    program = torch.compile(
        parallel(DeepEPProvider(), bound), fullgraph=True, backend=backend, dynamic=True
    )
    check_case("uneven", program)
    x, ids, weights = tokens_with("uneven", dist.get_rank())
    send = DeepEPProvider().implementation(dispatch)
    return found, send(x, ids, weights, EXPERTS, group(), bound)[0].shape[0]


def too_many_tokens(interface: str) -> None:
    EMULATORS[interface].install()
    x, ids, weights = tokens_of("even", 0, HIDDEN, DTYPE)
    program = parallel(DeepEPProvider(), len(x) - 1)
    with pytest.raises(ValueError, match=r"got 6 tokens .* up to 5, .*max_tokens_per_rank"):
        program(x, weights, *parameters(HIDDEN, DTYPE), ids)


@each
def test_eager_recomputed_and_compiled_on_two_ranks(interface: str, bound: int | None) -> None:
    on_ranks(2, check_programs, interface, bound)


@both
def test_a_bound_makes_every_size_known(interface: str) -> None:
    assert on_ranks(2, compiled_sizes, interface, MOST) == [([False, False], 2 * MOST)] * 2


def test_without_a_bound_sizes_depend_on_data() -> None:
    assert all(found == [True, True] for found, _ in on_ranks(2, compiled_sizes, "Buffer", None))


@both
def test_more_tokens_than_the_bound(interface: str) -> None:
    on_ranks(2, too_many_tokens, interface)


def test_the_ops_and_their_buffers() -> None:
    on_ranks(2, check_ops)


@both
@pytest.mark.matrix
def test_on_four_ranks(interface: str) -> None:
    on_ranks(4, check_plain, interface)


@each
@pytest.mark.slow
def test_compiled_with_inductor(interface: str, bound: int | None) -> None:
    on_ranks(2, check_inductor, interface, bound)


def emulation() -> None:
    rank, buffer = dist.get_rank(), deep_ep_emulator.Buffer
    size = buffer.get_dispatch_config(2).get_nvl_buffer_size_hint(HIDDEN * 2, 2)
    made = buffer(dist.group.WORLD, size, 0, explicitly_destroy=True)  # type: ignore[arg-type]
    x, ids, weights = tokens_with("uneven", rank)
    per_rank, _, per_expert, is_sent, _ = made.get_dispatch_layout(ids, EXPERTS)
    layout: dict[str, Any] = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": is_sent,
        "num_tokens_per_expert": per_expert,
        "topk_idx": ids,
        "topk_weights": weights,
    }
    rows, picks, _, counts, handle, _ = made.dispatch(x, **layout)
    assert sum(counts) == int((picks >= 0).sum())
    padded, fixed, _, none, worst, _ = made.dispatch(x, **layout, num_worst_tokens=200)
    assert none == []
    assert padded.shape[0] == worst[3].shape[0] == 200
    assert torch.equal(padded[: len(rows)], rows)
    assert bool(padded[len(rows) :].isnan().all())
    assert bool((fixed[len(rows) :] == -1).all())
    assert torch.equal(made.combine(rows, handle)[0], made.combine(padded, worst)[0])
    copies = is_sent.sum(1, keepdim=True)
    assert torch.equal(made.combine(rows, handle)[0], (x.float() * copies).bfloat16())
    assert torch.equal(made.dispatch(x, handle=handle)[0], rows)
    for wrong in (x.float(), x.T, x[:, :248].contiguous()):
        with pytest.raises(AssertionError):
            made.dispatch(wrong, **layout)
    made.destroy()


def test_the_emulation_is_what_it_says() -> None:
    on_ranks(2, emulation)

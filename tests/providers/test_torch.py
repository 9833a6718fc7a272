from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compile.ops import (
    CanonicalOp,
    attention,
    experts,
    gated_mlp,
    normed_rotary,
    rms_norm,
    rotary,
)
from moe_compile.providers.formula import FormulaProvider
from moe_compile.providers.provider import Call, Lacks
from moe_compile.providers.torch import TorchProvider

PROVIDER = TorchProvider()
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def run(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Output and every gradient, with all floating arguments in `dtype`."""

    def cast(a: Any) -> Any:
        is_float = isinstance(a, Tensor) and a.is_floating_point()
        return a.detach().to(dtype).requires_grad_(a.requires_grad) if is_float else a

    cast_args = [cast(a) for a in args]
    leaves = [a for a in cast_args if isinstance(a, Tensor) and a.requires_grad]
    out = fn(*cast_args, **kwargs)
    gen = torch.Generator().manual_seed(7)
    grad = torch.randn(out.shape, generator=gen, device="cpu").bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(
    op: CanonicalOp[..., Tensor], dtype: torch.dtype, *args: Any, fn: Any = None, **kwargs: Any
) -> None:
    """The provider is within twice the reference's own error against float64, or 4 eps."""
    got = run(fn or PROVIDER.implementation(op), args, kwargs, dtype)
    own = run(op, args, kwargs, dtype)
    want = run(op, args, kwargs, torch.float64)
    for g, o, w in zip(got, own, want, strict=True):
        assert (g.dtype, g.shape) == (o.dtype, o.shape)
        own_error = (o.double() - w).norm()
        eps = torch.finfo(dtype).eps
        assert (g.double() - w).norm() <= max(2 * own_error, 4 * eps * w.norm())


def leaf(*shape: int) -> Tensor:
    """Exact in bfloat16, so that every dtype sees the same numbers."""
    return torch.randn(shape).bfloat16().float().requires_grad_()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"cast_first": True}, {"offset": 1.0}])
def test_rms_norm(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_close(rms_norm, dtype, leaf(3, 5, 32), leaf(32), 1e-5, **options)


def test_rms_norm_keeps_the_promoted_dtype() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    got = PROVIDER.implementation(rms_norm)(x, weight, 1e-5, cast_first=True)
    assert torch.equal(got, rms_norm(x, weight, 1e-5, cast_first=True))
    assert got.dtype == torch.float32


def test_rms_norm_without_weight() -> None:
    assert_close(rms_norm, torch.bfloat16, leaf(3, 32), None, 1e-5)


def test_rotary_and_gated_mlp_are_their_references() -> None:
    assert PROVIDER.implementation(rotary) is rotary.reference
    assert PROVIDER.implementation(gated_mlp) is gated_mlp.reference


def test_normed_rotary_is_taken_where_there_are_kernels() -> None:
    for device, takes in (("cpu", False), ("cuda", True)):
        with FakeTensorMode():
            x, of_one = (torch.empty(*size, 3, 5, 8, device=device) for size in ((2,), ()))
            angles = [torch.empty(2, 1, 5, 8, device=device) for _ in range(2)]
        for provider in (PROVIDER, FormulaProvider()):
            heads, head = (Call((t, None, *angles, 1e-6)) for t in (x, of_one))
            assert (provider.supports(normed_rotary, heads) is None) == takes
            assert isinstance(provider.supports(normed_rotary, head), Lacks)
    assert FormulaProvider().implementation(normed_rotary) is normed_rotary.reference


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    some = torch.rand(2, 1, queries, keys) > 0.3
    some[0, 0, 1] = False  # a query that sees nothing
    low = torch.finfo(torch.bfloat16).min
    return {
        "no mask": None,
        "bool": some,
        "float": leaf(queries, keys).detach(),
        "low": torch.zeros(2, 1, queries, keys).masked_fill(~some, low),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["no mask", "bool", "float", "low"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 3}]
)
def test_attention(options: dict[str, Any], mask: str, sinks: bool, dtype: torch.dtype) -> None:
    q, k, v = leaf(2, 4, 7, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16)
    chosen, sink = masks(7, 7)[mask], leaf(4) if sinks else None
    assert_close(attention, dtype, q, k, v, chosen, sink, scale=0.25, **options)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (1, 4)])
def test_attention_over_other_lengths_and_value_sizes(queries: int, keys: int, sinks: bool) -> None:
    q, k, v = leaf(1, 4, queries, 16), leaf(1, 4, keys, 16), leaf(1, 4, keys, 8)
    sink = leaf(4) if sinks else None
    assert_close(attention, torch.float32, q, k, v, None, sink, scale=0.25, causal=True)


def test_attention_drops_weights() -> None:
    q, k, v = leaf(1, 1, 64, 16), leaf(1, 1, 64, 16), torch.ones(1, 1, 64, 1)
    out = PROVIDER.implementation(attention)(q, k, v, None, None, scale=0.25, dropout=0.5)
    assert 0.9 < out.mean() < 1.1
    assert out.std() > 0.01


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def expert_leaves(tokens: int, transposed: bool = False, bias: bool = False) -> list[Tensor]:
    """x, weights, up, down and maybe biases: K = 2, E = 4, H = 16, I = 8, Hout = 24."""
    down = leaf(4, 8, 24) if transposed else leaf(4, 24, 8)
    biases = [leaf(4, 16), leaf(4, 24)] if bias else []
    return [leaf(tokens, 16), leaf(tokens, 2), leaf(4, 16, 16), down, *biases]


def check_experts(
    ids: Tensor,
    dtype: torch.dtype,
    fn: Any = None,
    bias: bool = False,
    transposed: bool = False,
    weigh_input: bool = False,
) -> None:
    x, weights, *matrices = expert_leaves(len(ids), transposed=transposed, bias=bias)
    args = (x, ids, weights, *matrices[:2], swiglu, *matrices[2:])
    assert_close(experts, dtype, *args, fn=fn, transposed=transposed, weigh_input=weigh_input)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weigh_input", [False, True])
def test_experts(weigh_input: bool, bias: bool, transposed: bool, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 4, (13, 2))
    check_experts(ids, dtype, weigh_input=weigh_input, bias=bias, transposed=transposed)


@settings(deadline=None, max_examples=40)
@given(
    ids=st.integers(0, 6).flatmap(
        lambda tokens: st.lists(
            st.lists(st.integers(-1, 3), min_size=2, max_size=2), min_size=tokens, max_size=tokens
        )
    ),
    bias=st.booleans(),
    weigh_input=st.booleans(),
)
def test_experts_on_any_routing(ids: list[list[int]], bias: bool, weigh_input: bool) -> None:
    picks = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    check_experts(picks, torch.float32, bias=bias, weigh_input=weigh_input)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [-1, 0, 3])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_experts_all_in_one_place(tokens: int, fill: int, dtype: torch.dtype) -> None:
    check_experts(torch.full((tokens, 2), fill), dtype, bias=True)


def test_experts_take_int32_ids_and_float32_weights() -> None:
    x, weights, up, down = (t.detach() for t in expert_leaves(5))
    ids = torch.randint(-1, 4, (5, 2), dtype=torch.int32)
    x, up, down = (t.bfloat16() for t in (x, up, down))
    got = PROVIDER.implementation(experts)(x, ids, weights, up, down, swiglu)
    assert got.dtype == torch.bfloat16
    x, weights, up, down = (t.double() for t in (x, weights, up, down))
    exact = experts(x, ids, weights, up, down, swiglu)
    assert (got.double() - exact).norm() < 0.01 * exact.norm()


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a device: values on the host, and sizes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not waits, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weigh_input", [False, True])
def test_tokens_without_a_pick_may_be_anything(weigh_input: bool, bias: bool) -> None:
    """NaN in them and in their gradients reaches nothing else; and nothing waits to tell them."""
    ids = torch.randint(-1, 4, (9, 2))
    ids[6:] = -1
    x, weights, up, down, *biases = expert_leaves(9, bias=bias)
    found: list[list[Tensor]] = []
    for garbage in (0.0, float("nan")):
        inputs = [t.detach().clone().requires_grad_() for t in (x, weights, up, down, *biases)]
        inputs[0].data[6:] = garbage
        grad = torch.ones(9, 24)
        grad[6:] = garbage
        with NoWaiting():
            out = PROVIDER.implementation(experts)(
                inputs[0], ids, *inputs[1:4], swiglu, *inputs[4:], weigh_input=weigh_input
            )
            grads = torch.autograd.grad(out, inputs, grad)
        found.append([out[:6], grads[0][:6], grads[1][:6], *grads[2:]])
    for clean, value in zip(*found, strict=True):
        assert torch.equal(clean, value)
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weigh_input", [False, True])
def test_what_is_kept_has_rows_for_the_picks_that_are_here(weigh_input: bool, bias: bool) -> None:
    """Of 14 picks, 7 are: nothing else changes, forward or backward."""
    ids = torch.tensor([[3, 0, 0, 2, 1, 3, 3], [-1] * 7]).T
    leaves = expert_leaves(7, bias=bias)
    found: list[list[Tensor]] = []
    for places, rows in ((None, 14), (torch.empty(7, 0), 7)):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        x, weights, up, down, *biases = inputs = [t.detach().requires_grad_() for t in leaves]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = PROVIDER.implementation(experts)(
                x, ids, weights, up, down, swiglu, *biases, weigh_input=weigh_input, places=places
            )
        assert max(t.shape[0] for t in kept if t.dim() == 2) == rows
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(map(torch.equal, *found))


def test_experts_gradcheck() -> None:
    ids = torch.tensor([[0, 3], [-1, 3], [3, 1]])
    x, weights, up, down, *biases = (t.detach().double() for t in expert_leaves(3, bias=True))
    leaves = [t.requires_grad_() for t in (x, weights, up, down, *biases)]

    def op(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        return PROVIDER.implementation(experts)(x, ids, weights, up, down, swiglu, *biases)

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


# Dynamo instantiates every autograd.Function that it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_compile_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    fn = PROVIDER.implementation(experts)
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 33, 1, 0):
        check_experts(torch.randint(-1, 4, (tokens, 2)), dtype, fn=compiled, bias=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_experts_on_a_gpu(tokens: int, compiled: bool) -> None:
    fn = PROVIDER.implementation(experts)
    fn = torch.compile(fn, fullgraph=True, dynamic=True) if compiled else fn
    with torch.device("cuda"):
        check_experts(torch.randint(-1, 4, (tokens, 2)), torch.bfloat16, fn=fn, bias=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_with_two_layouts_of_its_gradient(compiled: bool) -> None:
    """cuDNN's backward, once it has run, takes every gradient's strides for those of the first."""
    fn = PROVIDER.implementation(attention)
    fn = torch.compile(fn, fullgraph=True) if compiled else fn
    with torch.device("cuda"):
        shapes = (2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64)
        leaves = [torch.randn(s).bfloat16().transpose(1, 2).requires_grad_() for s in shapes]
        grad = torch.randn(2, 256, 4, 64).bfloat16().transpose(1, 2)
    arguments: dict[str, Any] = {"scale": 0.125, "causal": True}
    exact = [t.detach().double().requires_grad_() for t in leaves]
    query, key, value = exact
    wanted = attention(query, key, value, None, None, **arguments)
    wanted = torch.autograd.grad(wanted, exact, grad.double())
    for layout in (grad, grad.contiguous()):
        got = torch.autograd.grad(fn(*leaves, None, None, **arguments), leaves, layout)
        for g, w in zip(got, wanted, strict=True):
            assert (g - w).norm() <= 0.01 * w.norm()


def test_experts_copy_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    grouped_mm = F.grouped_mm

    def spy(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        taken.append(w)
        return grouped_mm(x, w, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    for transposed in (False, True):
        x, weights, up, down = expert_leaves(5, transposed)
        args = (x, torch.randint(0, 4, (5, 2)), weights, up, down, swiglu)
        PROVIDER.implementation(experts)(*args, transposed=transposed)
        assert [w.data_ptr() for w in taken] == [up.data_ptr(), down.data_ptr()]
        taken.clear()


def test_refuses_mixed_dtypes() -> None:
    q = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    mask = torch.zeros(2, 2)
    refusal = PROVIDER.supports(attention, Call((q, q, q, mask, None), {"scale": 1.0}))
    assert refusal is not None
    assert refusal.reason == ("torch wants mask as torch.bfloat16, like query: got torch.float32")
    seen = torch.ones(2, 2, dtype=torch.bool)
    assert PROVIDER.supports(attention, Call((q, q, q, seen, None), {"scale": 1.0})) is None

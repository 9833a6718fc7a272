from collections.abc import Callable

import pytest
import torch

from moe_compile.ops import experts, linear_cross_entropy, rms_norm
from moe_compile.providers import Call
from moe_compile.providers.formula import FormulaProvider
from moe_compile.providers.provider import Lacks
from tests.providers.test_torch import check_experts, expert_leaves, leaf, run, swiglu

PROVIDER = FormulaProvider()
EXPERTS: Callable[..., torch.Tensor] = PROVIDER.implementation(experts)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weigh_input", [False, True])
def test_experts(weigh_input: bool, bias: bool, transposed: bool, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 4, (13, 2))
    options = {"weigh_input": weigh_input, "bias": bias, "transposed": transposed}
    check_experts(ids, dtype, fn=EXPERTS, **options)


@pytest.mark.parametrize("fill", [-1, 0, 3])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_experts_all_in_one_place(tokens: int, fill: int) -> None:
    check_experts(torch.full((tokens, 2), fill), torch.float32, fn=EXPERTS, bias=True)


@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tokens_without_a_pick_may_be_anything(bias: bool, weigh_input: bool) -> None:
    """NaN in them and in their gradients reaches no other token, and no expert."""
    ids = torch.randint(-1, 4, (9, 2))
    ids[6:] = -1
    x, weights, up, down, *biases = expert_leaves(9, bias=bias)
    found: list[list[torch.Tensor]] = []
    for garbage in (0.0, float("nan")):
        inputs = [t.detach().clone().requires_grad_() for t in (x, weights, up, down, *biases)]
        inputs[0].data[6:] = garbage
        grad = torch.ones(9, 24)
        grad[6:] = garbage
        rows, picks, *matrices = inputs
        args = (rows, ids, picks, *matrices[:2], swiglu, *matrices[2:])
        out = EXPERTS(*args, weigh_input=weigh_input)
        of_x, *others = torch.autograd.grad(out, inputs, grad)
        found.append([out.detach()[:6], of_x[:6], *others])
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(16 + 8,), (4, 24)])
def test_a_norm_after_each_expert(shape: tuple[int, ...]) -> None:
    x, weights, up, down = expert_leaves(13)
    ids = torch.randint(-1, 4, (13, 2))
    options = {"norm": lambda rows, w: rms_norm(rows, w, 1e-5), "norm_weight": leaf(*shape)}
    args = (x, ids, weights, up, down, swiglu)
    got = run(EXPERTS, args, options, torch.float64)
    want = run(experts, args, options, torch.float64)
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_experts_compile_for_any_number_of_tokens() -> None:
    torch.compiler.reset()
    compiled = torch.compile(EXPERTS, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 33, 1, 0):
        check_experts(torch.randint(-1, 4, (tokens, 2)), torch.float32, fn=compiled, bias=True)


def test_the_norm_is_the_reference() -> None:
    assert PROVIDER.implementation(rms_norm) is rms_norm.reference
    assert PROVIDER.supports(rms_norm, Call((leaf(2, 8), leaf(8), 1e-6))) is None


def test_what_torch_computes_so_too_is_no_candidate() -> None:
    for call in (
        Call((leaf(2, 8), leaf(8), 1e-6), {"offset": 1.0}),
        Call((leaf(2, 8).bfloat16(), leaf(8), 1e-6)),
    ):
        assert isinstance(PROVIDER.supports(rms_norm, call), Lacks)
    assert isinstance(PROVIDER.supports(linear_cross_entropy, Call(())), Lacks)


def test_refuses_what_torch_refuses() -> None:
    x, weights, up, down = expert_leaves(5)
    ids = torch.zeros(5, 2, dtype=torch.int64)
    refusal = PROVIDER.supports(experts, Call((x, ids, weights, up, down.bfloat16(), swiglu)))
    assert refusal is not None
    assert not isinstance(refusal, Lacks)
    assert "torch wants down as torch.float32" in refusal.reason

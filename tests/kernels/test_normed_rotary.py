"""The norm of heads and their rotary embedding in one kernel, against float64."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from moe_compile import ops
from moe_compile.kernels.normed_rotary import misfit, normed_rotary, turn_normed

EPS = 1e-6
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Case = tuple[Tensor, Tensor | None, Tensor, Tensor]


def case(
    *shape: int,
    angles: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    weight: torch.dtype | None = torch.float32,
    device: str = "cpu",
) -> Case:
    """x[B, heads, S, D], laid out as a projection gives it; and cosines and sines of `angles`."""
    torch.manual_seed(0)
    batch, heads, length, width = shape
    x = torch.randn(batch, length, heads, width).to(device, dtype).transpose(1, 2)
    scale = None if weight is None else (1 + torch.randn(width)).to(device, weight)
    angle = torch.randn(angles)
    cos, sin = (t.to(device, dtype) for t in (angle.cos(), angle.sin()))
    return x, scale, cos, sin


def results(
    function: Callable[..., Tensor],
    given: Case,
    *,
    rounded: torch.dtype = torch.float32,
    **form: Any,
) -> list[Tensor]:
    """The output, and the gradients of x and the weight, for a gradient `rounded` to a dtype."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in given[:2]]
    out = function(*leaves, *given[2:], EPS, **form)
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to(out.device, rounded).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def widened(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Case:
    return x.double(), None if weight is None else weight.double(), cos.double(), sin.double()


def check(given: Case, **form: Any) -> None:
    """In shapes and dtypes as the reference, and within four roundings of it in float64."""
    theirs = results(ops.normed_rotary, given, **form)
    options = form | {"rounded": theirs[0].dtype}
    got = results(normed_rotary, given, **options)
    want = results(ops.normed_rotary, widened(*given), **options)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in theirs]
    for mine, right in zip(got, want, strict=True):
        error = (mine.double() - right).norm()
        assert error <= 4 * torch.finfo(mine.dtype).eps * right.norm()


WIDTHS = [(64, 64), (80, 40), (128, 128), (256, 128), (10, 10)]
FORMS = [
    {"cast_first": first, "offset": offset, "interleaved": interleaved}
    for first, offset, interleaved in itertools.product((True, False), (0.0, 1.0), (True, False))
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, None),
]


def fitting(form: dict[str, Any], width: int, angle: int) -> dict[str, Any]:
    """Pairs beside each other have one angle each."""
    return form | {"interleaved": form["interleaved"] and angle < width}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "weight"), DTYPES)
def test_against_float64(
    dtype: torch.dtype, weight: torch.dtype | None, form: dict[str, Any]
) -> None:
    given = case(2, 3, 5, 8, angles=(2, 1, 5, 4), dtype=dtype, weight=weight)
    check(given, **form)


@pytest.mark.parametrize("angles", [(2, 1, 5, 8), (1, 1, 5, 8), (5, 8), (1, 5, 4), (1, 1, 1, 8)])
def test_angles_of_any_rank(angles: tuple[int, ...]) -> None:
    check(case(2, 3, 5, 8, angles=angles))


@pytest.mark.parametrize("angles", [(2, 5, 1, 8), (1, 5, 1, 4), (2, 1, 1, 8)])
def test_heads_after_tokens(angles: tuple[int, ...]) -> None:
    x, weight, cos, sin = case(2, 3, 5, 8, angles=angles)
    check((x.transpose(1, 2), weight, cos, sin))


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    check(case(2, 3, tokens, 8, angles=(1, 1, tokens, 8)))


def test_layout_is_that_of_the_projection() -> None:
    out, grad, _ = results(normed_rotary, case(2, 3, 5, 8, angles=(2, 1, 5, 8)))
    assert out.transpose(1, 2).is_contiguous()
    assert grad.transpose(1, 2).is_contiguous()


def test_gradients_and_contracts() -> None:
    x, weight, cos, sin = widened(*case(2, 3, 5, 8, angles=(2, 1, 5, 8)))
    assert weight is not None
    leaves = [t.requires_grad_() for t in (x, weight, cos, sin)]
    for offset in (0.0, 1.0):
        run = functools.partial(normed_rotary, eps=EPS, offset=offset)
        assert torch.autograd.gradcheck(run, leaves)
    angles = [torch.randn(1, 5, 4, requires_grad=True) for _ in range(2)]
    heads = torch.randn(2, 3, 5, 8).transpose(1, 2).requires_grad_()
    for weight in (torch.randn(8, requires_grad=True), None):
        given = (heads, weight, *angles, EPS, 0.0, True, torch.float32)
        torch.library.opcheck(turn_normed, given)


def test_compiles_for_any_sizes() -> None:
    torch.compiler.reset()
    run = torch.compile(normed_rotary, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((2, 5), (3, 7)):
        given = case(batch, 3, length, 8, angles=(1, 1, length, 8))
        torch.testing.assert_close(results(run, given), results(normed_rotary, given))


@pytest.mark.parametrize(
    ("shape", "angles", "dtype", "why"),
    [
        ((2, 3, 5, 8), (2, 1, 5, 8), torch.float64, "it takes bfloat16, float16 and float32"),
        ((2, 3, 5, 8), (2, 3, 5, 8), torch.float32, "the same angles for all heads"),
        ((1, 3, 5, 8), (2, 1, 5, 8), torch.float32, "the angles of each token"),
        ((2, 3, 5, 9), (2, 1, 5, 9), torch.float32, "even widths"),
        ((2, 3, 5, 8), (2, 1, 5, 2), torch.float32, "whole heads"),
        ((2, 3, 5, 2048), (2, 1, 5, 2048), torch.float32, "up to 1024"),
    ],
)
def test_refuses(
    shape: tuple[int, ...], angles: tuple[int, ...], dtype: torch.dtype, why: str
) -> None:
    reason = misfit(*case(*shape, angles=angles, dtype=dtype))
    assert reason is not None
    assert why in reason


def test_refuses_other_ranks() -> None:
    x, weight, cos, sin = case(2, 3, 5, 8, angles=(2, 1, 5, 8))
    assert "four dimensions" in (misfit(x[0], weight, cos, sin) or "")
    assert misfit(x, weight, cos, sin) is None


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "weight"), DTYPES)
@pytest.mark.parametrize(("width", "angle"), WIDTHS)
def test_on_a_gpu(
    width: int,
    angle: int,
    dtype: torch.dtype,
    weight: torch.dtype | None,
    form: dict[str, Any],
) -> None:
    for batch, heads, length in ((2, 4, 33), (1, 1, 1), (1, 32, 257), (3, 5, 1000), (2, 4, 0)):
        for rows in (1, batch):
            given = case(
                *(batch, heads, length, width),
                angles=(rows, 1, length, angle),
                dtype=dtype,
                weight=weight,
                device="cuda",
            )
            check(given, **fitting(form, width, angle))


@pytest.mark.gpu
@gpu
def test_any_strides_on_a_gpu() -> None:
    x, weight, cos, sin = case(2, 3, 50, 64, angles=(2, 1, 50, 64), device="cuda")
    wide = torch.randn(2, 50, 5, 64, device="cuda")[:, :, 1:4].transpose(1, 2)
    apart = torch.randn(2, 3, 50, 128, device="cuda")[..., ::2]
    for heads in (x, x.contiguous(), wide, apart):
        check((heads, weight, cos, sin))
    leaf = x.detach().requires_grad_()
    runs = (run(leaf, weight, cos, sin, EPS) for run in (normed_rotary, ops.normed_rotary))
    # The gradient of a sum is one number, without strides.
    got, want = (torch.autograd.grad(out.sum(), leaf)[0] for out in runs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@gpu
def test_the_same_bits_again_on_a_gpu() -> None:
    given = case(2, 4, 1000, 128, angles=(1, 1, 1000, 128), device="cuda")
    first, again = (results(normed_rotary, given) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_graph_starts_the_kernels_itself() -> None:
    run = torch.compile(normed_rotary, fullgraph=True, dynamic=True)
    given = case(2, 4, 33, 64, angles=(1, 1, 33, 64), dtype=torch.bfloat16, device="cuda")
    got, code = run_and_get_code(results, run, given)
    assert len(code) == 2
    assert not any("moe_compile." in text for text in code), "an operator is still called"
    torch.testing.assert_close(got, results(normed_rotary, given))
    for batch, length in ((1, 3), (3, 257)):
        given = case(batch, 4, length, 64, angles=(1, 1, length, 64), device="cuda")
        torch.testing.assert_close(results(run, given), results(normed_rotary, given))

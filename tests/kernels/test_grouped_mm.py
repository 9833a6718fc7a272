from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compile.kernels.grouped_mm import grouped_linear, grouped_mm, grouped_mm_weight_grad

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def loop(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    ends = offs.tolist()
    groups = [x[s:e] @ w[i] for i, (s, e) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat([*groups, x.new_zeros(x.shape[0] - ends[-1], w.shape[2])])


def case(
    counts: list[int], a: int, b: int, dtype: torch.dtype, tail: int = 0, view: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(len(counts) * 100 + sum(counts))
    x = torch.randn(sum(counts) + tail, a, generator=gen).to(dtype)
    w = torch.randn(len(counts), *((b, a) if view else (a, b)), generator=gen).to(dtype)
    offs = torch.tensor(counts).cumsum(0).int()
    return x.requires_grad_(), w.requires_grad_(), offs


def run(fn: Any, x: Tensor, w: Tensor, offs: Tensor) -> list[Tensor]:
    out = fn(x, w, offs)
    gen = torch.Generator().manual_seed(0)
    grad = torch.randn(out.shape, generator=gen).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, (x, w), grad)]


def distance(got: Tensor, want: Tensor) -> float:
    norm = want.norm().item()
    return (got.double() - want).norm().item() / (norm or 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize(("a", "b"), [(16, 24), (7, 5), (16, 7), (1, 8)])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0], [0, 9, 0], [1]])
def test_equals_the_loop(counts: list[int], a: int, b: int, view: bool, dtype: torch.dtype) -> None:
    x, w, offs = case(counts, a, b, dtype, tail=2, view=view)

    def op(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(x, w.mT if view else w, offs)

    def reference(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return loop(x, w.mT if view else w, offs)

    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    eps = torch.finfo(dtype).eps
    own, wants = run(reference, x, w, offs), run(reference, wide_x, wide_w, offs)
    for got, mine, want in zip(run(op, x, w, offs), own, wants, strict=True):
        assert got.dtype == dtype
        assert distance(got, want) <= max(4 * eps, 2 * distance(mine, want))


@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    tail=st.integers(0, 3),
    a=st.integers(1, 9),
    b=st.integers(1, 9),
)
def test_any_grouping(counts: list[int], tail: int, a: int, b: int) -> None:
    x, w, offs = case(counts, a, b, torch.float64, tail)
    for got, want in zip(run(grouped_mm, x, w, offs), run(loop, x, w, offs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tail_is_zero_in_output_and_gradient(dtype: torch.dtype) -> None:
    x, w, offs = case([2, 3], 8, 8, dtype, tail=4)
    out, grad_x, _ = run(grouped_mm, x, w, offs)
    assert out[5:].eq(0).all()
    assert grad_x[5:].eq(0).all()


def test_outputs_are_fresh_and_contiguous() -> None:
    x, w, offs = case([4, 4], 16, 7, torch.float32, view=True)
    for out in (grouped_mm(x, w.mT, offs), grouped_mm_weight_grad(x, x, offs)):
        assert out.is_contiguous()
        assert out.storage_offset() == 0


def test_an_expanded_gradient() -> None:
    x, w, offs = case([4, 4], 16, 16, torch.float32)
    grouped_mm(x, w, offs).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.sum(2).repeat_interleave(4, dim=0))


def test_a_transposed_view_gets_its_gradient_in_its_own_layout() -> None:
    x, w, offs = case([4, 4], 16, 24, torch.float32, view=True)
    (grad,) = torch.autograd.grad(grouped_mm(x, w.mT, offs).square().sum(), w)
    assert grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [False, True])
def test_transposed_is_a_view(view: bool, dtype: torch.dtype) -> None:
    x, w, offs = case([3, 0, 5], 16, 24, dtype, tail=1, view=not view)

    def turned(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(x, w.mT if view else w, offs, True)

    def reference(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(x, w if view else w.mT, offs)

    for got, want in zip(run(turned, x, w, offs), run(reference, x, w, offs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0]])
def test_opcheck(counts: list[int], dtype: torch.dtype) -> None:
    x, w, offs = case(counts, 16, 8, dtype, tail=1)
    torch.library.opcheck(grouped_mm, (x, w, offs))
    torch.library.opcheck(grouped_mm, (x, w.detach().mT.contiguous(), offs, True))
    torch.library.opcheck(grouped_mm_weight_grad, (x.detach(), x.detach(), offs))


def test_gradcheck() -> None:
    x, w, offs = case([3, 0, 2], 3, 4, torch.float64, tail=1)
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, offs), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_with_dynamic_rows(dtype: torch.dtype) -> None:
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for counts in ([3, 2], [0, 0], [1, 0], [40, 2]):
        x, w, offs = case(counts, 16, 8, dtype)
        for got, want in zip(run(compiled, x, w, offs), run(grouped_mm, x, w, offs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fn", [grouped_mm, grouped_linear])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize(("a", "b"), [(64, 96), (64, 7), (7, 64)])
def test_on_a_gpu(fn: Any, a: int, b: int, view: bool, dtype: torch.dtype) -> None:
    tail = 9 if fn is grouped_mm else 0  # where `grouped_linear` leaves anything
    x, w, offs = (
        t.detach().cuda() for t in case([30, 0, 50, 1], a, b, dtype, tail=tail, view=view)
    )
    w = w.mT if view else w
    eps = torch.finfo(dtype).eps
    x, w = (t.requires_grad_() for t in (x, w))
    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    for got, want in zip(run(fn, x, w, offs), run(loop, wide_x, wide_w, offs), strict=True):
        assert distance(got, want) <= 4 * eps

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_compile.kernels import linear_cross_entropy as kernel
from moe_compile.kernels.linear_cross_entropy import linear_cross_entropy
from moe_compile.ops import linear_cross_entropy as op


def soft_cap(logits: Tensor) -> Tensor:
    return torch.tanh(logits.float() / 5.0) * 5.0


TRANSFORMS = [None, soft_cap]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_FEWEST_ROWS", 8)


def case(
    rows: int, width: int, words: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((rows, width), (words, width), (words,))
    )
    labels = torch.randint(words, (rows,), generator=generator)
    labels[::4] = -100
    return x, weight, labels.to(device), bias


def run(fn: Callable[..., Tensor], *leaves: Tensor, **options: object) -> list[Tensor]:
    x, weight, _, *rest = leaves
    loss = fn(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (x, weight, *rest))]


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rows", [2, 8, 9, 50])
def test_equals_the_reference(
    rows: int, transform: Callable[[Tensor], Tensor] | None, mean: bool
) -> None:
    leaves = case(rows, 4, 33, torch.float64)
    options = {"transform": transform, "mean": mean}
    got, want = (run(fn, *leaves, **options) for fn in (linear_cross_entropy, op.reference))
    tolerance = 1e-6 if transform else 1e-12  # the cap computes in float32
    assert max(map(distance, got, want)) < tolerance


def test_bfloat16_is_as_close_as_the_reference() -> None:
    leaves = case(50, 16, 300, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in leaves]
    exact = run(op.reference, *wide)
    ours, theirs = (run(fn, *leaves) for fn in (linear_cross_entropy, op.reference))
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert distance(got, want) <= 2 * distance(other, want) + 4 * 2**-8


@pytest.mark.parametrize("fn", [linear_cross_entropy, op.reference])
def test_no_rows_and_no_labels(fn: Callable[..., Tensor]) -> None:
    x, weight, labels, _ = case(6, 4, 33, torch.float32)
    loss, grad_x, grad_weight = run(fn, x, weight, torch.full_like(labels, -100), mean=False)
    assert loss == 0
    assert not grad_x.any()
    assert not grad_weight.any()
    assert run(fn, x, weight, torch.full_like(labels, -100))[0].isnan()
    empty = run(fn, x.detach()[:0].requires_grad_(), weight, labels[:0], mean=False)
    assert empty[0] == 0
    assert not empty[2].any()


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, labels, _ = case(6, 4, 33, torch.float32)
    weight.requires_grad_(False)
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(op(x, weight, labels), x)[0])


def test_a_second_backward_is_an_error() -> None:
    x, weight, labels, _ = case(6, 4, 33, torch.float32)
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_hooks_on_saved_tensors(transform: Callable[[Tensor], Tensor] | None) -> None:
    leaves = case(9, 4, 33, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved):
        got = run(linear_cross_entropy, *leaves, transform=transform)
    want = run(linear_cross_entropy, *leaves, transform=transform)
    torch.testing.assert_close(got, want)


def test_a_compiled_transform_is_the_same() -> None:
    logits, _, labels, _ = case(9, 33, 33, torch.float32)
    scale, counts = torch.tensor(0.5), labels != -100
    got, want = logits.detach().clone(), logits.detach().clone()
    loss = kernel._compiled(soft_cap, False)(got, labels, counts, scale)
    torch.testing.assert_close(loss, kernel._gradient_of(soft_cap)(want, labels, counts, scale))
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("rows", "words"), [(2, 7), (50, 8192), (300, 20000)])
def test_on_a_gpu(
    rows: int, words: int, transform: Callable[[Tensor], Tensor] | None, dtype: torch.dtype
) -> None:
    leaves = case(rows, 64, words, dtype, "cuda")
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in leaves]
    exact = run(op.reference, *wide, transform=transform)
    theirs = run(op.reference, *leaves, transform=transform)
    run(linear_cross_entropy, *leaves, transform=transform)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = run(linear_cross_entropy, *leaves, transform=transform)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    eps = torch.finfo(dtype).eps
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert distance(got, want) <= 2 * distance(other, want) + 4 * eps

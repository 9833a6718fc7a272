"""What eight-bit numbers stand for, and what their products are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.ops import fp8, fp8_linear
from moe_compile.ops.fp8 import E4M3, E5M2, RECIPES, ROW, Block, Recipe


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("block", "scales"),
    [((None, None), (1, 1)), (ROW, (256, 1)), ((1, 128), (256, 3)), ((128, 128), (2, 3))],
)
@pytest.mark.parametrize(("dtype", "digits"), [(E4M3, 3), (E5M2, 2)])
def test_numbers_keep_their_digits(
    block: Block, scales: tuple[int, int], dtype: torch.dtype, digits: int
) -> None:
    x = normal(256, 384)
    q, scale = fp8.quantize(x, dtype, block)
    assert (q.dtype, q.shape) == (dtype, x.shape)
    assert scale.shape == scales
    wide = fp8.dequantize(q, scale)
    large = x.abs() > x.abs().max() / 100
    assert float(((wide - x) / x).abs()[large].max()) <= 2 ** -(digits + 1)
    assert float(q.float().abs().max()) == torch.finfo(dtype).max


def test_every_block_has_its_own_scale() -> None:
    x = normal(2, 256)
    x[0, :128] *= 1e4
    q, scale = fp8.quantize(x, E4M3, (1, 128))
    torch.testing.assert_close(scale.flatten() * 448, x.view(4, 128).abs().amax(1))
    assert error(fp8.dequantize(q, scale)[1], x[1]) < 0.05


def test_stacks_of_matrices_are_quantised_matrix_by_matrix() -> None:
    x = normal(3, 16, 32)
    each = zip(*(fp8.quantize(matrix, E4M3, ROW) for matrix in x), strict=True)
    for got, want in zip(fp8.quantize(x, E4M3, ROW), each, strict=True):
        assert torch.equal(got.float(), torch.stack(want).float())


def test_zeros_are_zeros_and_nan_stays() -> None:
    assert not fp8.rounded(torch.zeros(4, 16), E4M3, ROW).any()
    bad = torch.ones(2, 16)
    bad[0, 3] = torch.nan
    assert fp8.rounded(bad, E4M3, ROW)[0].isnan().any()
    assert torch.equal(fp8.rounded(bad, E4M3, ROW)[1], torch.ones(16))


def gradients(fn: Any, x: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    out = fn(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9))


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_near_a_linear_layer_and_not_equal(recipe: Recipe) -> None:
    x, weight = normal(2, 40, 256), normal(128, 256, seed=1)
    exact = gradients(torch.nn.functional.linear, x, weight)
    for found, wanted in zip(gradients(fp8_linear, x, weight, recipe=recipe), exact, strict=True):
        assert 0.01 < error(found, wanted) < 0.08


def test_gradients_are_products_of_rounded_numbers() -> None:
    x, weight = normal(32, 64), normal(16, 64, seed=1)
    out, grad_x, grad_weight = gradients(fp8_linear, x, weight)
    grad = fp8.rounded(normal(32, 16, seed=9), E5M2, (None, None))
    a, b = (fp8.rounded(t, E4M3, (None, None)) for t in (x, weight))
    for found, wanted in ((out, a @ b.T), (grad_x, grad @ b), (grad_weight, grad.T @ a)):
        torch.testing.assert_close(found, wanted)


def test_bias_is_exact() -> None:
    x, weight, bias = normal(3, 32), normal(16, 32), normal(16, seed=2)
    assert torch.equal(fp8_linear(x, weight, bias), fp8_linear(x, weight) + bias)


def test_under_autocast_it_computes_in_its_dtype() -> None:
    x, weight = normal(3, 32), normal(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fp8_linear(x, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fp8_linear(x.bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows(recipe: Recipe) -> None:
    out, grad_x, grad_weight = gradients(
        fp8_linear, normal(0, 128), normal(128, 128), recipe=recipe
    )
    assert (out.shape, grad_x.shape) == ((0, 128), (0, 128))
    assert not grad_weight.any()

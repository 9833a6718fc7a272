# pyright: basic

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.verify import field
from moe_compile.verify.field import P
from moe_compile.verify.oracle import Dual, prove


def values(*size: int) -> Tensor:
    return field.random(torch.Size(size), torch.Generator().manual_seed(sum(size)))


def test_elementwise_arithmetic_is_exact():
    a, b = values(50), values(60)[:50]
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert field.add(a, b).tolist() == [(x + y) % P for x, y in pairs]
    assert field.sub(a, b, 3).tolist() == [(x - 3 * y) % P for x, y in pairs]
    assert field.mul(a, b).tolist() == [x * y % P for x, y in pairs]
    assert field.div(a, b).tolist() == [x * pow(y, -1, P) % P for x, y in pairs]


@pytest.mark.parametrize("exponent", [0, 1, 2, 13, -1, -3])
def test_integer_powers(exponent: int):
    a = values(20)
    assert field.power(a, exponent).tolist() == [pow(x, exponent, P) for x in a.tolist()]


def test_the_inverse_of_zero_is_zero():
    assert field.inverse(torch.tensor([0, 1])).tolist() == [0, 1]


def test_matmul_is_exact_for_a_long_inner_dimension_of_the_largest_values():
    k = 2**15 + 7
    a, b = torch.full((2, k), P - 1), torch.full((k, 1), P - 2)
    assert field.matmul(a, b).tolist() == [[k * 2 % P]] * 2


def test_matmul_broadcasts_batches():
    a, b = values(2, 1, 3, 4), values(5, 4, 2)
    got = field.matmul(a, b)
    assert got.shape == (2, 5, 3, 2)
    want = sum(x * y for x, y in zip(a[1, 0, 2].tolist(), b[3, :, 1].tolist(), strict=True))
    assert int(got[1, 3, 2, 1]) == want % P


def test_matmul_of_an_empty_inner_dimension_is_zero():
    assert field.matmul(values(2, 0), values(0, 3)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("value", [0.1, -2 / 3, 7, 1e-6, 0.044715, 3.5e38, math.pi])
def test_a_constant_is_its_fraction(value: float):
    near = Fraction(value).limit_denominator(1000)
    fraction = near if float(near) == value else Fraction(value)
    assert field.constant(value) * fraction.denominator % P == fraction.numerator % P


def test_roots_are_the_same_however_they_were_rounded():
    assert 1 / math.sqrt(8) != 8**-0.5
    assert field.constant(8**-0.5) == field.constant(1 / math.sqrt(8))
    assert field.constant(8**-0.5) ** 2 * 8 % P == 1
    assert field.constant(-math.sqrt(2)) == P - field.constant(math.sqrt(2))


def test_other_floats_stay_apart():
    rng = random.Random(0)
    numbers = [rng.gauss(0, 1) for _ in range(1000)]
    assert len({field.constant(n) for n in numbers}) == 1000
    assert field.constant(1e-6) != field.constant(1e-6 + 1e-21)


def test_infinities_are_zero():
    assert field.constant(math.inf) == field.constant(math.nan) == 0


def test_lift():
    got = field.lift(torch.tensor([[0.5, -3.0], [0.0, 0.5]]))
    assert got.tolist() == [[pow(2, -1, P), P - 3], [0, pow(2, -1, P)]]
    assert field.lift(torch.tensor([-1, 5])).tolist() == [P - 1, 5]
    assert field.lift(torch.tensor([True, False])).tolist() == [1, 0]


def test_uninterpreted_functions_depend_on_name_and_arguments():
    a, b = values(1000), values(1001)[:1000]
    assert torch.equal(field.uninterpreted("f", a), field.uninterpreted("f", a.clone()))
    images = [
        field.uninterpreted(name, *args)
        for name, args in [("f", (a,)), ("g", (a,)), ("f", (a, b)), ("f", (b, a)), ("f", (b,))]
    ]
    distinct = torch.cat(images).unique()
    assert len(distinct) > 4990
    assert 0 <= int(distinct.min()) < P // 100
    assert P - P // 100 < int(distinct.max()) < P


# On numbers alone the field must agree with the reals: this checks the data plane of each operator.

ROWS = torch.tensor([0, 2, 2, 1, 0, 5])
OFFS = torch.tensor([1, 4, 6], dtype=torch.int32)
CUBE = torch.arange(48, dtype=torch.float64).view(3, 4, 4) % 7 - 3

ALGEBRA: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: torch.add(x, x[0], alpha=3) - 2,
    "rsub": lambda x: torch.rsub(x, 2, alpha=3),
    "div": lambda x: x / 4 + x / torch.where(x > 0, -2.0, 0.5),
    "pow": lambda x: x**3,
    "mean": lambda x: x.mean() + x.mean(0) + x.mean((0, 1), keepdim=True),
    "var": lambda x: torch.var_mean(x, 1, correction=2)[0] + x.var(1, correction=0),
    "cumsum": lambda x: x.cumsum(0),
    "linear": lambda x: F.linear(x.view(2, 3, 4), CUBE[0], CUBE[1, 0]),
    "baddbmm": lambda x: torch.baddbmm(CUBE, CUBE, x[:4].expand(3, 4, 4), beta=0.5, alpha=2),
    "einsum": lambda x: torch.einsum("ti,eij->tej", x, CUBE),
    "outer": lambda x: torch.outer(x[0], x[1]) + x[2] @ x[3],
    "grouped_mm": lambda x: F.grouped_mm(x, CUBE, offs=OFFS),
    "grouped_mm, transposed": lambda x: F.grouped_mm(x, CUBE.transpose(1, 2), offs=OFFS),
    "grouped_mm, batched": lambda x: F.grouped_mm(CUBE, x.view(3, 2, 4).transpose(1, 2)),
    "grouped_mm, columns": lambda x: F.grouped_mm(CUBE, x.t(), offs=OFFS),
    "where": lambda x: torch.where(x > 0, x, 2.5) + x.masked_fill(x < 0, 1),
    "clamp": lambda x: x.clamp(-1, 2) + x.clamp(min=0) + F.relu(x) + x.abs() * x.sign(),
    "maximum": lambda x: torch.maximum(x, x.flip(0)) * torch.minimum(x, x.roll(1, 0)),
    "max": lambda x: x.max(0).values + x.min(1, keepdim=True).values + x.amin((0, 1)) + x.max(),
    "sort": lambda x: x.sort(0).values * CUBE[0, 0] + x.topk(2, 0).values[:1],
    "gather": lambda x: (
        x.gather(0, ROWS[:, None].expand(6, 4)) + x.take_along_dim(ROWS[:, None], 0)
    ),
    "index": lambda x: x[ROWS] + x.index_select(0, ROWS) + F.embedding(ROWS, x),
    "scatter": lambda x: x.scatter(0, ROWS[:1, None], x[5:, :1]).scatter(1, ROWS[3:4, None], 3.0),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(0, ROWS[:, None].expand(6, 4), x),
    "index_add": lambda x: torch.ones_like(x).index_add_(0, ROWS, x),
    "index_copy": lambda x: x.index_copy(0, ROWS[3:5], x[:2]),
    "index_put": lambda x: torch.zeros_like(x).index_put((ROWS,), x, accumulate=True),
    "masks": lambda x: x[x > 0].sum() + x.masked_scatter(x > 0, x.flip(0)),
    "repeat": lambda x: x.repeat(2, 1) + x.repeat_interleave(2, 0),
    "repeat_interleave": lambda x: x.repeat_interleave(ROWS, 0),
    "pad": lambda x: F.pad(x, (1, 2), value=0.5),
    "cat": lambda x: torch.cat([torch.stack([x, x * 2]).flatten(0, 1), x]),
    "tril": lambda x: x.tril() - x.triu(1),
    "views": lambda x: x.t().contiguous().view(2, 2, 6)[:, 1, ::2].unsqueeze(0).expand(3, 2, 3),
    "split": lambda x: torch.cat(x.split([1, 3, 2])[::-1]) * x.unbind(1)[2][:, None],
    "mse": lambda x: F.mse_loss(x, x.flip(0)),
    "lerp": lambda x: torch.lerp(x, x * 3, 0.25) + torch.addcmul(x, x, x, value=2),
    "float32": lambda x: (x.float() * 2).double() + x.to(torch.bfloat16).double(),
    "select": lambda x: x.select_scatter(x[1], 0, 0).slice_scatter(x[:2], 0, 2, 4),
    "leaky": lambda x: F.threshold(x, 1.0, -2.0) + F.glu(x * 0, -1).sum(),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_the_field_agrees_with_the_reals_on_numbers(name: str):
    x = (torch.arange(24, dtype=torch.float64).view(6, 4) * 5 % 24 - 11).requires_grad_() / 2
    with Dual() as dual:
        y = ALGEBRA[name](x)
        (gradient,) = torch.autograd.grad((y * y).sum(), x)
    assert torch.equal(dual.field(y), field.lift(y))
    assert torch.equal(dual.field(gradient), field.lift(gradient))


@pytest.mark.parametrize("function", [torch.tanh, torch.erf, torch.sin], ids=lambda f: f.__name__)
def test_functions_that_are_zero_at_zero_are_so_in_the_field(function):
    """An expert that gets zeros in place of no token must give zeros."""
    prove(lambda x: function(x * 0), torch.zeros_like, [torch.randn(3, 4)])

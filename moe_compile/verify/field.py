"""Exact arithmetic in the prime field Z_p, p = 2**31 - 1, and the aten operators over it.

Field values are int64 tensors in [0, p). Two expressions with the same algebra agree bit for bit on
random values; two with different algebra agree on an element with probability degree / p at most.
"""

import functools
import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

aten = torch.ops.aten

P = 2**31 - 1
MODULUS = torch.tensor(P, device="cpu")  # of a number torch would make a tensor each time
Number = float | Tensor
Function = Callable[..., Any]


def random(size: torch.Size, generator: torch.Generator | None = None) -> Tensor:
    """Uniform field values."""
    return torch.randint(P, size, generator=generator)


@functools.cache
def constant(value: float) -> int:
    """The field value of a number, infinities and NaN as 0.

    A float that rounds a fraction with a small denominator, or the square root of one, stands for
    it: `x * (1 / 3)` is `x / 3` and `64**-0.5 * 2**-0.5` is `1 / math.sqrt(128)`. Any other is the
    exact fraction that it holds.
    """
    if not math.isfinite(value):
        return 0
    exact = Fraction(value)
    if (near := _simple(exact)) is not None:
        return _residue(near)
    if (near := _simple(exact**2)) is not None:
        square = _residue(near)
        root = pow(square, (P + 1) // 4, P)
        if root**2 % P == square:  # half of the numbers have a root in the field
            return root if value > 0 else P - root
    return _residue(exact)


def _simple(exact: Fraction) -> Fraction | None:
    near = exact.limit_denominator(1000)
    return near if abs(near - exact) <= abs(exact) * 2**-50 else None


def _residue(fraction: Fraction) -> int:
    return fraction.numerator * pow(fraction.denominator, -1, P) % P


def lift(value: Number) -> Tensor:
    """The field values of numbers, each taken as a constant; field values stay as they are."""
    if not isinstance(value, Tensor):
        return torch.tensor(constant(value))
    if not value.is_floating_point():
        return value.long() % MODULUS
    if not value.any():
        return torch.zeros(value.shape, dtype=torch.int64)
    numbers: list[float] = value.detach().double().flatten().tolist()  # pyright: ignore
    return torch.tensor([constant(n) for n in numbers], dtype=torch.int64).view(value.shape)


def add(a: Number, b: Number, alpha: float = 1) -> Tensor:
    """The sum a + alpha * b."""
    return (lift(a) + mul(b, alpha)) % MODULUS


def sub(a: Number, b: Number, alpha: float = 1) -> Tensor:
    """The difference a - alpha * b."""
    return (lift(a) - mul(b, alpha)) % MODULUS


def mul(a: Number, b: Number) -> Tensor:
    """The elementwise product; it stays below 2**62 before it is reduced."""
    return lift(a) * lift(b) % MODULUS


def div(a: Number, b: Number) -> Tensor:
    """The quotient a / b, with 0 for a division by 0."""
    return mul(a, inverse(lift(b)))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of any batch shape."""
    width = 2**15
    pieces = zip(a.split(width, -1), b.split(width, -2), strict=True)
    first, *others = (_short_matmul(*piece) for piece in pieces)
    return sum(others, first) % MODULUS


def _short_matmul(a: Tensor, b: Tensor) -> Tensor:
    # 16-bit halves of `a` keep a product below 2**47, so 2**15 of them sum without overflow
    low, high = a & 0xFFFF, a >> 16
    return ((high @ b % MODULUS) * 2**16 + low @ b) % MODULUS


def power(a: Tensor, exponent: int) -> Tensor:
    """The integer power; a negative one is a power of the inverse."""
    if exponent < 0:
        return power(inverse(a), -exponent)
    out = torch.ones_like(a)
    for bit in f"{exponent:b}":
        out = out * out % MODULUS
        out = out * a % MODULUS if bit == "1" else out
    return out


def inverse(a: Tensor) -> Tensor:
    """The multiplicative inverse, with 0 for 0: the power p - 2, by Fermat."""
    ones = {1: a}  # the power 2**n - 1 by n: that of m + n follows from those of m and n
    for m, n in ((1, 1), (2, 1), (3, 3), (6, 1), (7, 7), (14, 14), (28, 1)):
        ones[m + n] = _squared(ones[m], n) * ones[n] % MODULUS
    return _squared(ones[29], 2) * a % MODULUS  # p - 2 is 4 * (2**29 - 1) + 1


def _squared(a: Tensor, times: int) -> Tensor:
    for _ in range(times):
        a = a * a % MODULUS
    return a


def uninterpreted(name: str, *tensors: Tensor) -> Tensor:
    """A fixed pseudo-random elementwise function of field values, another one for each name."""
    state = torch.tensor(zlib.crc32(name.encode()))
    for tensor in tensors:
        state = _scramble(state * 31 + tensor)
    return state % MODULUS


def _scramble(z: Tensor) -> Tensor:
    """The finalizer of splitmix64; int64 products wrap around."""
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return z ^ (z >> 31)


def knows(func: OpOverload) -> bool:
    """Whether `run` gives the operator a meaning of its own."""
    return func in _EXACT or func.overloadpacket in _PACKETS


def run(func: OpOverload, real: Any, *args: Any, **kwargs: Any) -> Any:
    """The field values of an operator's floating outputs.

    `real` is its result on the reals, `args` are its arguments with field values for floats.
    """
    packet = func.overloadpacket
    if packet in _CONSTANT:
        return lift(real)
    if packet in _UNINITIALIZED:
        return random(real.shape)
    if packet in _DECIDED:
        return _DECIDED[packet](real, *args, **kwargs)
    exact = _EXACT.get(func) or _EXACT.get(packet) or func
    return exact(*args, **kwargs)


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    return x.sum(dim, keepdim) % MODULUS


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    total = _sum(x, dim, keepdim)
    return div(total, x.numel() // max(total.numel(), 1))


def _rsub(a: Number, b: Number, alpha: float = 1) -> Tensor:
    return sub(b, a, alpha)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return add(mul(bias, beta), matmul(a, b), alpha)


def _exp(x: Tensor) -> Tensor:
    return uninterpreted("exp", x)


def _exp_or_zero(real: Tensor, x: Tensor) -> Tensor:
    return _where(real == 0, 0, _exp(x))


def _expm1(x: Tensor) -> Tensor:
    return _exp(x) - 1


def _log1p(x: Tensor) -> Tensor:
    return uninterpreted("log", add(x, 1))


def _sigmoid(real: Tensor, x: Tensor) -> Tensor:
    return _where(real == 0, 0, inverse((1 + _exp(-x % MODULUS)) % MODULUS))


def _sqrt(x: Tensor) -> Tensor:
    return uninterpreted("sqrt", x)


def _rsqrt(x: Tensor) -> Tensor:
    return inverse(_sqrt(x))


def _power(x: Tensor, exponent: float) -> Tensor:
    if float(exponent).is_integer():
        return power(x, int(exponent))
    if float(2 * exponent).is_integer():  # so that x ** -1.5 is rsqrt(x) ** 3
        return power(_sqrt(x), int(2 * exponent))
    return uninterpreted("pow", x, lift(exponent))


def _where(condition: Tensor, a: Number, b: Number) -> Tensor:
    return torch.where(condition, lift(a), lift(b))


def _masked_fill(x: Tensor, mask: Tensor, value: Number) -> Tensor:
    return _where(mask, value, x)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return lift(source).expand(x.shape)


def _scatter(x: Tensor, dim: int, index: Tensor, value: Number) -> Tensor:
    return x.scatter(dim, index, value if isinstance(value, Tensor) else constant(value))


def _pad(x: Tensor, pad: list[int], value: float = 0) -> Tensor:
    return F.pad(x, pad, value=constant(value))


def _cumsum(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return x.cumsum(dim)


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _sort(real: Any, x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:
    return x.gather(dim, real[1])


def _topk(real: Any, x: Tensor, k: int, dim: int = -1, *_: Any, **__: Any) -> Tensor:
    return x.gather(dim, real[1])


def _transcendental(name: str) -> Function:
    return lambda *values: uninterpreted(name, *map(lift, values))


def _zero_at_zero(name: str) -> Function:
    return lambda x: _where(x == 0, 0, uninterpreted(name, x))


def _packets(names: str) -> frozenset[OpOverloadPacket]:
    return frozenset(getattr(aten, name) for name in names.split())


_EXACT: dict[OpOverload | OpOverloadPacket, Function] = {
    aten.add: add,
    aten.sub: sub,
    aten.rsub: _rsub,
    aten.mul: mul,
    aten.div.Tensor: div,
    aten.div.Scalar: div,
    aten.neg: torch.neg,
    aten.reciprocal: inverse,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.cumsum: _cumsum,
    aten.mm: matmul,
    aten.bmm: matmul,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Scalar: _transcendental("pow"),
    aten.pow.Tensor_Tensor: _transcendental("pow"),
    aten.sqrt: _sqrt,
    aten.rsqrt: _rsqrt,
    aten.expm1: _expm1,
    aten.log: _transcendental("log"),
    aten.log1p: _log1p,
    aten.log2: _transcendental("log2"),
    aten.exp2: _transcendental("exp2"),
    aten.tanh: _zero_at_zero("tanh"),
    aten.erf: _zero_at_zero("erf"),
    aten.sin: _zero_at_zero("sin"),
    aten.cos: _transcendental("cos"),
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.constant_pad_nd: _pad,
    aten.clone: _same,
    aten.conj_physical: _same,
    aten._to_copy: _same,
    aten.copy: _copy,
}

# The reals take part: the underflow that makes a masked score vanish, and the order of a sort.
_DECIDED: dict[OpOverloadPacket, Function] = {
    aten.exp: _exp_or_zero,
    aten.sigmoid: _sigmoid,
    aten.sort: _sort,
    aten.topk: _topk,
}

# These only move or add up values, so they run as they are on field values.
_MOVES = _packets(
    """_unsafe_view cat stack gather index index_select embedding index_put index_add index_copy
    _unsafe_index _unsafe_index_put _index_put_impl scatter_add masked_select masked_scatter
    masked_scatter_backward slice_scatter select_scatter diagonal_scatter slice_backward
    select_backward repeat flip roll tril triu"""
)

# Numbers that no longer depend on the data plane.
_CONSTANT = _packets(
    "zeros_like ones_like full_like new_zeros new_ones new_full fill zero sign sgn histc"
)

# Random in the field, so that a function which reads them is disproved.
_UNINITIALIZED = _packets(
    "empty empty_like empty_permuted empty_strided new_empty new_empty_strided"
)

_PACKETS = {*_EXACT, *_DECIDED, *_MOVES, *_CONSTANT, *_UNINITIALIZED}

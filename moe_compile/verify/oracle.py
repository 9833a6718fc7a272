"""Prove that two functions have the same algebra, forward and backward.

Both run on the same real inputs and, at the same time, on the same random values of a prime field.
The reals decide the control plane: routing, sorting, offsets, comparisons, branches. The field
values are the data plane, in exact arithmetic, with transcendental functions left uninterpreted.
Equal field values prove equal algebra, for that control flow, up to about 2**-31 an element: no
tolerance to tune and no small difference that passes. Rounding is left to a check against float64.

Nothing is traced: every aten operator that reaches the dispatcher, below autograd, is run in both
planes. So a loop over the experts that are hit, or an `item()`, needs no care.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_compile.verify import field
from moe_compile.verify.field import Function, Number
from moe_compile.verify.in_float64 import default_float64, in_float64

aten = torch.ops.aten


class Disproved(AssertionError):
    """Two functions differ; the message names each output and gradient that does."""


def prove(before: Function, after: Function, inputs: Sequence[Tensor]) -> None:
    """Raise `Disproved` unless `before` and `after` have equal outputs and input gradients.

    Both take `inputs` (floats, and integers or booleans for ids and masks) and return a tensor or a
    tuple or list of tensors. Narrower floats are float64 in them. The gradients are those of a
    random linear function of the outputs.
    """
    expected, actual = _evaluate(before, inputs), _evaluate(after, inputs)
    if expected.keys() != actual.keys():
        raise Disproved(f"{len(expected)} outputs and gradients become {len(actual)}")
    reasons = [_difference(name, expected[name], actual[name]) for name in expected]
    if any(reasons):
        raise Disproved("; ".join(filter(None, reasons)))


def _difference(name: str, expected: Tensor, actual: Tensor) -> str | None:
    if expected.shape != actual.shape:
        return f"{name} has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    count = int((expected != actual).sum())
    return f"{name} differs in {count} of {expected.numel()} elements" if count else None


def _evaluate(function: Function, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The field values (numbers, of control tensors) of every output and every input gradient."""
    generator = torch.Generator().manual_seed(0)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    arguments = [x.detach().clone().requires_grad_(_is_data(x)) for x in wide]
    leaves = [x for x in arguments if x.requires_grad]
    with _Spelled(), default_float64(), Dual() as dual:
        dual.randomize(leaves, generator)
        outputs: list[Tensor] = tree_leaves(function(*arguments))
        floats = [y for y in outputs if _is_data(y)]
        cotangents = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in floats]
        dual.randomize(cotangents, generator)
        gradients = _gradients(floats, leaves, cotangents)
    values = {f"output {i}": dual.field(y) for i, y in enumerate(outputs)}
    for i, x in enumerate(arguments):
        if x in gradients:
            values[f"the gradient of input {i}"] = dual.field(gradients[x])
    return values


def _gradients(
    outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]
) -> dict[Tensor, Tensor]:
    roots = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not roots or not leaves:
        return {x: torch.zeros_like(x) for x in leaves}
    ys, cs = zip(*roots, strict=True)
    gradients = torch.autograd.grad(ys, leaves, cs, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _is_data(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _has_data(values: Any) -> bool:
    if isinstance(values, dict):
        values = list(values.values())
    return any(map(_has_data, values)) if isinstance(values, (list, tuple)) else _is_data(values)


_VALUES = "_moe_compile_field"
"""Where a tensor keeps its field values, and whose they are."""


class Dual(TorchDispatchMode):
    """Runs each operator on the reals and keeps the field values of every float tensor."""

    def __init__(self) -> None:
        """Start with no values: every tensor is a constant until it is randomized."""
        super().__init__()  # pyright: ignore

    def field(self, real: Tensor) -> Tensor:
        """The field values of a tensor; one that was not computed from the inputs is constant."""
        if not _is_data(real):
            return field.lift(real)
        owner, value = vars(real).get(_VALUES, (None, None))
        return value if owner is self else self._record(real, field.lift(real))

    def randomize(self, reals: Iterable[Tensor], generator: torch.Generator) -> None:
        """Give tensors random field values."""
        for real in reals:
            self._record(real, field.random(real.shape, generator))

    def _operand(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._operand, value))
        return self.field(value) if _is_data(value) else value

    def _record(self, real: Tensor, value: Tensor) -> Tensor:
        # the strides of the real, so that every view of it is a view of its field values
        if value.stride() != real.stride() or value.shape != real.shape:
            value = torch.empty_like(real, dtype=torch.int64).copy_(value)
        vars(real)[_VALUES] = self, value
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator in both planes."""
        with torch._C.DisableTorchFunction():  # modes above are for the judged code alone
            return self._run_both(func, args, in_float64(kwargs))

    def _run_both(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        meaning = _meaning(func)
        if meaning is not None:
            with self:
                return meaning(*args, **kwargs)
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs)
        real = func(*args, **kwargs)
        reals = list(filter(_is_data, [real] if isinstance(real, Tensor) else tree_leaves(real)))
        if reals and (field.knows(func) or _has_data((args, kwargs))):
            self._run(func, real, reals, args, kwargs)
        return real

    def _run(self, func: Any, real: Any, reals: list[Tensor], args: Any, kwargs: Any) -> None:
        """Compute the field values of `reals`, the floats in the result `real`."""
        if not any(x.numel() for x in reals):
            return
        fields, options = map(self._operand, args), {k: self._operand(v) for k, v in kwargs.items()}
        if func.is_view and reals[0].dtype == args[0].dtype:
            views = tree_leaves(func(*fields, **options))
            for real, view in zip(reals, views, strict=True):
                vars(real)[_VALUES] = self, view
        elif not field.knows(func):
            raise _unknown(func)
        else:
            values = tree_leaves(field.run(func, real, *fields, **options))
            for x, value in zip(reals, values, strict=True):
                self._record(x, value % field.MODULUS)

    def _mutate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an in-place operator as its functional form and a copy."""
        target = args[0]
        if not _is_data(target):
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            value = args[1]
        else:
            with self:
                value = _functional(func)(*args, **kwargs)
        self.field(target).copy_(self.field(value))
        return target.copy_(value)


def _meaning(func: Any) -> Function | None:
    """The meaning of an operator that is not run as it is."""
    return INTERPRETERS.get(func) or _decomposition(func)


@functools.cache
def _decomposition(func: Any) -> Function | None:
    if func._can_decompose():  # decompositions run below autograd, where composites remain
        return func.decompose
    if func.is_view or func._schema.is_mutable or field.knows(func):
        return None
    return _DECOMPOSITIONS.get(func)


def _functional(func: Any) -> Function:
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    functional = getattr(packet, func._overloadname, None)
    if functional is None:
        raise _unknown(func)
    return functional


def _unknown(func: Any) -> NotImplementedError:
    return NotImplementedError(f"the oracle does not know {func}; add its meaning to INTERPRETERS")


class _Spelled(TorchFunctionMode):
    """Replaces functions by their definition, so that autograd sees it too.

    The attention kernels scale queries and keys by a rounded root of the scale, the derivative of
    logsumexp takes other exponentials than softmax, and that of gelu other constants than gelu.
    """

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function."""
        return _SPELLINGS.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    factor = math.sqrt(1 / query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    top = x.amax(dim, keepdim=True)
    out = (x - top).exp().sum(dim, keepdim=True).log() + top
    return out if keepdim else out.squeeze(dim)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))
    return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


_SPELLINGS: dict[Any, Function] = {
    F.scaled_dot_product_attention: _attention,
    aten.scaled_dot_product_attention: _attention,
    aten.scaled_dot_product_attention.default: _attention,
    torch.logsumexp: _logsumexp,
    Tensor.logsumexp: _logsumexp,
    aten.logsumexp.default: _logsumexp,
    F.gelu: _gelu,
    aten.gelu.default: _gelu,
}

# The meaning of the other operators in simpler ones.


def _relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def _abs(x: Tensor) -> Tensor:
    return torch.where(x < 0, -x, x)


def _maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a >= b, a, b)


def _minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a <= b, a, b)


def _silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def _amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    dims = [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim or range(x.ndim))]
    kept = [d for d in range(x.ndim) if d not in dims]
    flat = x.permute(*kept, *dims).flatten(len(kept))
    largest = flat.gather(-1, flat.argmax(-1, keepdim=True)).squeeze(-1)
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    return largest.reshape(shape) if keepdim else largest


def _amin(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return -_amax(-x, dim, keepdim)


def _max(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    index = x.argmax(dim, keepdim=True)
    pair = x.gather(dim, index), index
    return pair if keepdim else (pair[0].squeeze(dim), index.squeeze(dim))


def _min(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, index = _max(-x, dim, keepdim)
    return -values, index


def _clamp(x: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    x = x if low is None else torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def _shifted(x: Tensor, dim: int) -> Tensor:
    top = _amax(x, dim, keepdim=True)
    return torch.where(top == -torch.inf, x, x - top)


def _softmax(x: Tensor, dim: int, _: Any = None) -> Tensor:
    exp = _shifted(x, dim).exp()
    total = exp.sum(dim, keepdim=True)
    return exp / torch.where(total == 0, 1.0, total)


def _log_softmax(x: Tensor, dim: int, _: Any = None) -> Tensor:
    shifted = _shifted(x, dim)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, _: Any) -> Tensor:
    return output * (grad - (grad * output).sum(dim, keepdim=True))


def _log_softmax_backward(grad: Tensor, output: Tensor, dim: int, _: Any) -> Tensor:
    # the softmax of a log-softmax is the softmax, which the exp of it is not in the field
    return grad - _softmax(output, dim) * grad.sum(dim, keepdim=True)


def _var(x: Tensor, dim: Any = None, *, correction: float = 1, keepdim: bool = False) -> Tensor:
    mean = x.mean(dim, keepdim=True)
    count = x.numel() // mean.numel() - correction
    return (x - mean).square().sum(dim, keepdim) / count


def _std(x: Tensor, dim: Any = None, **options: Any) -> Tensor:
    return _var(x, dim, **options).sqrt()


def _var_mean(x: Tensor, dim: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    return _var(x, dim, **options), x.mean(dim, options.get("keepdim", False))


def _norm(x: Tensor, p: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return x.abs().pow(p).sum(dim, keepdim).pow(1 / p)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(-len(shape), 0))
    mean = x.mean(dims, keepdim=True)
    rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    out = (x - mean) * rstd
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: None = None, out_dtype: Any = None
) -> Tensor:
    if offs is None:
        return torch.bmm(a, b)
    bounds: list[int] = [0, *offs.tolist()]  # pyright: ignore
    groups = [slice(*pair) for pair in itertools.pairwise(bounds)]
    if a.ndim == b.ndim == 2:
        return torch.stack([a[:, s] @ b[s] for s in groups])
    if a.ndim == 3:
        rest = b.new_empty(a.shape[1], b.shape[1] - bounds[-1])
        return torch.cat([*(a[g] @ b[:, s] for g, s in enumerate(groups)), rest], dim=1)
    rest = a.new_empty(a.shape[0] - bounds[-1], b.shape[2])
    return torch.cat([*(a[s] @ b[g] for g, s in enumerate(groups)), rest])


INTERPRETERS: dict[OpOverload, Function] = {
    aten.relu.default: _relu,
    aten.abs.default: _abs,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.maximum.default: _maximum,
    aten.minimum.default: _minimum,
    aten.amax.default: _amax,
    aten.amin.default: _amin,
    aten.max.default: _amax,
    aten.min.default: _amin,
    aten.max.dim: _max,
    aten.min.dim: _min,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.linalg_vector_norm.default: _norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.silu.default: _silu,
    aten._grouped_mm.default: _grouped_mm,
}
"""The meaning of operators as functions of simpler ones; add the meaning of a custom operator here.

A function takes the operator's arguments and returns what it would, in torch operations below
autograd. So an operator with a backward of its own needs that operator's meaning here too.
"""

_DECOMPOSITIONS: dict[Any, Function] = dict(core_aten_decompositions())

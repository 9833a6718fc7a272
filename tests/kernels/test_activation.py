"""Activations written in Triton, against torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile.kernels.activation import activate, activate_backward, is_fusable, register
from moe_compile.kernels.activation_source import activation_source

WIDTH = 10
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Activation = Callable[[Tensor], Tensor]


def swiglu(x: Tensor) -> Tensor:
    return F.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :]


def interleaved(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=1.0), x[..., 1::2].clamp(min=-1.0, max=1.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def geglu(x: Tensor) -> Tensor:
    return F.gelu(x[:, : x.shape[1] // 2], approximate="tanh") * x[:, x.shape[1] // 2 :]


def exact_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


def widened(x: Tensor) -> Tensor:
    return F.silu(x.float()).to(x.dtype)


FUSABLE = [swiglu, interleaved, geglu, exact_gelu, squared_relu, widened]


def half_of_it(x: Tensor) -> Tensor:
    return F.silu(x[:, : x.shape[1] // 2])


def twice_the_same(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2] * x[:, : x.shape[1] // 2]


def overlapping(x: Tensor) -> Tensor:
    return x[:, :-1] * x[:, 1:]


def a_sum(x: Tensor) -> Tensor:
    return F.silu(x) / x.sum(-1, keepdim=True)


def a_power(x: Tensor) -> Tensor:
    return x.abs() ** 2.5


NOT_FUSABLE = [half_of_it, twice_the_same, overlapping, a_sum, a_power, softplus]


def key_of(activation: Activation, width: int = WIDTH) -> str:
    return register(make_fx(activation)(torch.ones(3, width)).graph)


def case(
    activation: Activation, rows: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = 2 * torch.randn(rows, width), torch.rand(rows, 1)
    grad = torch.randn(activation(x).shape)
    return x.to(device, dtype), weight.to(device), grad.to(device, dtype)


def expected(activation: Activation, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out = activation(x) * weight
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad.double())]


@pytest.mark.parametrize("activation", FUSABLE)
def test_its_source_computes_it(activation: Activation) -> None:
    source = activation_source(make_fx(activation)(torch.ones(3, WIDTH)).graph, WIDTH)
    assert source is not None
    x, weight, grad = case(activation, 6, WIDTH, torch.float32)
    names = {f"x{i}": x[:, c.start :: c.step][:, : c.count] for i, c in enumerate(source.columns)}
    found = evaluated(source.backward.lines, {"grad": grad * weight, **names})
    wanted = expected(activation, x, weight, grad)
    check(found[source.backward.results[0]] * weight, wanted[0])
    again = evaluated(source.forward.lines, names)
    assert torch.equal(again[source.forward.results[0]], found[source.backward.results[0]])
    for columns, name in zip(source.columns, source.backward.results[1:], strict=True):
        part = wanted[1][:, columns.start :: columns.step][:, : columns.count]
        check(found[name], part)


def check(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


class Language:
    """Triton's functions, as torch's."""

    exp, log, erf = torch.exp, torch.log, torch.erf
    sqrt, rsqrt, abs = torch.sqrt, torch.rsqrt, torch.abs
    sigmoid = torch.sigmoid

    class PropagateNan:
        ALL = None

    @staticmethod
    def maximum(a: Tensor, b: float | Tensor, propagate_nan: None) -> Tensor:
        return torch.maximum(a, torch.as_tensor(b))

    @staticmethod
    def minimum(a: Tensor, b: float | Tensor, propagate_nan: None) -> Tensor:
        return torch.minimum(a, torch.as_tensor(b))

    @staticmethod
    def where(condition: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        return torch.where(condition, a, b)


def evaluated(lines: tuple[str, ...], names: dict[str, Tensor]) -> dict[str, Tensor]:
    namespace = dict(names)
    exec("\n".join(lines), {"tl": Language}, namespace)
    return namespace


@pytest.mark.parametrize("activation", NOT_FUSABLE)
def test_what_is_no_function_of_single_numbers_has_none(activation: Activation) -> None:
    assert not is_fusable(key_of(activation), WIDTH)


def test_a_key_tells_activations_apart() -> None:
    keys = {key_of(activation) for activation in (*FUSABLE, *NOT_FUSABLE)}
    assert len(keys) == len(FUSABLE) + len(NOT_FUSABLE)
    assert key_of(swiglu) == key_of(swiglu)


def test_kernels_are_asked_for_under_modes_and_hooks() -> None:
    def cubed(x: Tensor) -> Tensor:
        return x * x * x

    key = key_of(cubed)  # nobody asked for this one yet
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with hooks, FakeTensorMode(), torch.no_grad():
        assert is_fusable(key, WIDTH)


def test_contracts() -> None:
    key = key_of(swiglu)
    x, weight, _ = case(swiglu, 4, WIDTH, torch.float64)
    assert is_fusable(key, WIDTH)
    leaves = x.requires_grad_(), weight.double().requires_grad_()
    offs = torch.tensor([1, 4], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, weight: activate(x, weight, offs, key), leaves)
    torch.library.opcheck(activate, (*leaves, offs, key))


def test_dynamo_asks_for_kernels_while_it_traces() -> None:
    def tanh(x: Tensor) -> Tensor:
        return torch.tanh(x)

    key = key_of(tanh)  # nobody asked for this one yet

    offs = torch.tensor([3], dtype=torch.int32)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return activate(x, weight, offs, key) if is_fusable(key, x.shape[1]) else x

    x, weight, _ = case(tanh, 3, WIDTH, torch.float32)
    got = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)(x, weight)
    torch.testing.assert_close(got, tanh(x) * weight)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [10, 1536, 5760])
@pytest.mark.parametrize("rows", [0, 1, 37, 9000])  # the last: more than there are programs
@pytest.mark.parametrize("activation", FUSABLE)
def test_on_a_gpu(activation: Activation, rows: int, width: int, dtype: torch.dtype) -> None:
    key = key_of(activation, width)
    assert is_fusable(key, width)
    x, weight, grad = case(activation, rows, width, dtype, "cuda")
    real = rows - rows // 3
    offs = torch.tensor([0, real, real], dtype=torch.int32, device="cuda")
    x[real:] = torch.nan
    found = [activate(x, weight, offs, key), *activate_backward(grad, x, weight, offs, key, True)]
    wanted = expected(activation, x[:real], weight[:real], grad[:real])
    wanted.append(wanted[0])
    for got, want in zip((t[:real] for t in found), wanted, strict=True):
        error = (got.double() - want).norm()
        limit = 2 if got.shape[1] > 1 else 50  # a weight's gradient is a sum that may cancel out
        assert error <= limit * torch.finfo(dtype).eps * want.norm()

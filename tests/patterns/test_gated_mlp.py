import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.passes import RaiseMLPs
from moe_compile.patterns import GatedMLP
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    assert_same_bits,
    normal,
    spelling,
)
from tests.patterns.idioms import gated_mlp, mlp_unit

SPELLINGS = templates(GatedMLP())


def with_activation(activation: Function) -> Function:
    def function(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)

    return function


def respelled(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Operands swapped, casts and reshapes that do nothing."""
    opened = F.silu(F.linear(x.view(x.shape), gate)).to(x.dtype)
    return F.linear(torch.multiply(F.linear(x.contiguous(), up), opened).contiguous(), down)


def biased(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate, a)) * F.linear(x, up, b), down, c)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def clamped(x: Tensor) -> Tensor:
    return x.clamp(max=7.0) * torch.sigmoid(1.702 * x)


def positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


@pytest.mark.parametrize("function", [gated_mlp, respelled])
def test_rewrites(function: Function) -> None:
    assert_raised(RaiseMLPs(), mlp_unit(function), ["gated_mlp"])


@pytest.mark.parametrize("activation", [F.gelu, relu_squared, clamped, positive])
def test_rewrites_any_activation_of_each_token(activation: Function) -> None:
    assert_raised(RaiseMLPs(), mlp_unit(with_activation(activation)), ["gated_mlp"])


def test_rewrites_layers_with_biases() -> None:
    unit = mlp_unit(biased, a=normal(6), b=normal(6), c=normal(8))
    assert_raised(RaiseMLPs(), unit, ["gated_mlp"])


def over_tokens(x: Tensor) -> Tensor:
    return x.softmax(1)


def summed(x: Tensor) -> Tensor:
    return F.silu(x) + x.sum(1, keepdim=True)


def other_input(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x.sin(), up), down)


def bias_on_the_gate(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, a: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate, a)) * F.linear(x, up), down)


def gate_used_outside(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    opened = F.silu(F.linear(x, gate))
    return F.linear(opened * F.linear(x, up), down), opened.sin()


def ungated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)), down)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (with_activation(over_tokens), "aten.softmax.int in the activation may mix tokens"),
        (with_activation(summed), "aten.sum.dim_IntList in the activation may mix tokens"),
        (other_input, "another value"),
        (gate_used_outside, "the inner value silu is used by sin outside the idiom"),
        (ungated, "expected aten.mul.Tensor, found aten.silu.default"),
    ],
)
def test_refuses(function: Function, reason: str) -> None:
    assert_refused(RaiseMLPs(), GatedMLP(), mlp_unit(function), reason)


def test_refuses_a_bias_on_one_layer_alone() -> None:
    unit = mlp_unit(bias_on_the_gate, a=normal(6))
    assert_refused(RaiseMLPs(), GatedMLP(), unit, "expected bias=None, found a?.*")


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, activation=F.silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_same_bits(template: Template, dtype: torch.dtype) -> None:
    assert_same_bits(template, dtype, activation=F.silu)

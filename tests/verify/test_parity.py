"""What `OptimizeConfig.verify` finds: a wrong rewrite is refused, the module stays as it was."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from moe_compile import PIPELINE, OptimizeConfig, Pass, ops
from moe_compile.patterns import RMSNorm
from moe_compile.providers import torch as torch_provider
from moe_compile.report import Site
from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.verify import parity

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = Norm()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.norm(x))


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def norm_site(verify: Any, model: nn.Module | None = None) -> Site:
    """The site of the norms; where they are refused, the model computes what it did."""
    model = Model() if model is None else model
    expected = model.eval()(X)
    model.train()
    config = OptimizeConfig(verify=verify)
    report = moe_compile.report(moe_compile.optimize(model, config=config, example_inputs=(X,)))
    (site,) = [site for site in report.sites if site.kind == "rms_norm"]
    if site.status == "refused":
        assert torch.equal(model.eval()(X), expected)
    return site


def replaced(monkeypatch: pytest.MonkeyPatch, implementation: Callable[..., Tensor]) -> None:
    monkeypatch.setitem(torch_provider._IMPLEMENTATIONS, ops.rms_norm, implementation)


@pytest.mark.parametrize("verify", ["auto", "raise", "full", "off"])
def test_a_right_rewrite_is_installed(verify: str) -> None:
    assert norm_site(verify).status == "rewritten"


def slightly_off(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return ops.rms_norm.reference(x, *args, **options) * 1.00001


def without_gradient(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return ops.rms_norm.reference(x.detach(), *args, **options)


def not_a_number(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return ops.rms_norm.reference(x, *args, **options) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (slightly_off, "output 0"),
        (without_gradient, "gradient of input 0"),
        (not_a_number, "error of nan"),
    ],
)
@pytest.mark.parametrize("verify", ["auto", "full"])
def test_a_wrong_implementation_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor], where: str, verify: str
) -> None:
    replaced(monkeypatch, wrong)
    site = norm_site(verify)
    assert site.status == "refused"
    assert "verification failed: the rewrite has an error" in str(site.reason)
    assert where in str(site.reason)


def errors_of(noise: float, reference: float) -> parity._Errors:
    """Of a small value beside a large one.

    `reference`: what float64 finds; the module itself finds 1e-7, the rewrite `noise`.
    """
    values = {n: {"large": torch.ones(4) * 100, "small": torch.ones(4) * n} for n in (noise, 1e-7)}
    wide = {"large": torch.ones(4) * 100, "small": torch.ones(4) * reference}
    scales = parity._scales(wide)
    new, own = (parity._errors(each, wide, scales) for each in values.values())
    return parity._Errors(1.2e-7, {}, new, own)


def test_what_is_zero_but_for_rounding_has_no_relative_error() -> None:
    assert errors_of(noise=1e-5, reference=1e-15).problem() is None
    assert errors_of(noise=1e-5, reference=0.0).problem() is None
    assert "in small" in str(errors_of(noise=1e-3, reference=1e-15).problem())
    assert "in small" in str(errors_of(noise=1e-5, reference=1e-6).problem())
    assert "in small" in str(errors_of(noise=float("nan"), reference=0.0).problem())


def test_off_verifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, slightly_off)
    assert norm_site("off").status == "rewritten"


@pytest.mark.parametrize("verify", ["raise", "full"])
def test_a_wrong_raise_is_disproved(monkeypatch: pytest.MonkeyPatch, verify: str) -> None:
    def after(x: Tensor, weight: Tensor | None, eps: float, **flags: bool) -> Tensor:
        # Closer than any tolerance, and another function all the same.
        return ops.rms_norm(x, weight, eps * (1 + 1e-6), cast_first=True)

    monkeypatch.setattr(RMSNorm, "after", staticmethod(after))
    site = norm_site(verify)
    assert site.status == "refused"
    assert "disproved over a prime field" in str(site.reason)


def test_randomness_elsewhere_in_the_layer_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, slightly_off)
    assert norm_site("auto", Model(dropout=0.5)).status == "refused"


class Picky(Norm):
    """Its own code fails on inputs that it does not expect."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.abs().max() < 50:
            raise ArithmeticError("too small")
        return super().forward(x)


def test_code_that_fails_on_the_example_is_refused() -> None:
    model = Model()
    for layer in model.layers:
        layer.norm = Picky()
    original = copy.deepcopy(model)
    report = moe_compile.report(moe_compile.optimize(model, example_inputs=(X,)))
    (site,) = report.sites
    assert site.reason == "its own code fails on small random inputs: too small"
    assert torch.equal(model(X * 100), original(X * 100))


@dataclass(frozen=True)
class Liar(Pass):
    """Gives a fact that never holds."""

    name = "liar"
    gives = frozenset({Fact("a lie", lambda _: False)})

    def run(self, unit: UnitGraph) -> int:
        return 0


def test_full_checks_the_facts_of_every_pass() -> None:
    passes = PIPELINE.before("lower", Liar())
    moe_compile.explain(Model(), passes=passes, example_inputs=(X,))
    config = OptimizeConfig(verify="full")
    with pytest.raises(AssertionError, match="'liar' does not give 'a lie'"):
        moe_compile.explain(Model(), config=config, passes=passes, example_inputs=(X,))

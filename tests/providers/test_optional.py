"""Packages that may be missing: what is refused, and how a report tells of it."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moe_compile.kernels import liger, quack, transformer_engine
from moe_compile.ops import experts, fp8_linear, gated_mlp, rms_norm
from moe_compile.passes import RaiseMLPs
from moe_compile.providers import Call
from moe_compile.providers import liger as liger_provider
from moe_compile.providers import quack as quack_provider
from moe_compile.providers import transformer_engine as te_provider
from moe_compile.providers.liger import LigerProvider
from moe_compile.providers.provider import Lacks, Provider
from moe_compile.providers.quack import QuackProvider
from moe_compile.providers.registry import takers
from moe_compile.providers.transformer_engine import TransformerEngineProvider
from moe_compile.report import Choice, Report, Site
from tests.patterns.harness import canonical_node
from tests.patterns.idioms import mlp_unit

BF16 = torch.bfloat16
LIGER, TE, QUACK = LigerProvider(), TransformerEngineProvider(), QuackProvider()


@pytest.fixture(autouse=True)
def _imported_anew() -> Iterator[None]:
    for module in (liger_provider, te_provider, quack_provider):
        module._import_problem.cache_clear()
    yield
    for module in (liger_provider, te_provider, quack_provider):
        module._import_problem.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_compile.providers.liger.library", lambda name: None)
    monkeypatch.setattr("moe_compile.providers.transformer_engine.library", lambda: None)
    monkeypatch.setattr("moe_compile.providers.quack.library", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def fake(*shape: int, dtype: torch.dtype = BF16, device: str = "cuda") -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


def norm(x: Tensor, weight: Tensor | None, **options: Any) -> Call:
    return Call((x, weight, 1e-6), options)


def problem(provider: Provider, call: Call) -> str | None:
    refusal = provider.supports(rms_norm, call)
    assert not isinstance(refusal, Lacks)
    return None if refusal is None else refusal.reason


X, W, WIDE = fake(2, 8), fake(8), fake(8, dtype=torch.float32)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("provider", [LIGER, TE])
@pytest.mark.parametrize("options", [{}, {"cast_first": True}, {"offset": 1.0}])
def test_takes_a_norm(provider: Provider, options: dict[str, Any]) -> None:
    assert problem(provider, norm(X, W, **options)) is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("provider", "call", "reason"),
    [
        (LIGER, norm(fake(2, 8, dtype=torch.float64), W), "float32: got torch.float64"),
        (LIGER, norm(fake(2, 65537), fake(65537)), "rows of up to 65536: got 65537"),
        (LIGER, norm(X, WIDE, cast_first=True), "the scale here is wider"),
        (LIGER, norm(X, W, cast_first=True, offset=1.0), "the scale here is wider"),
        (TE, norm(fake(2, 8, dtype=torch.float64), W), "float32: got torch.float64"),
        (TE, norm(X, None), "this one has none"),
        (TE, norm(X, WIDE), "got torch.float32"),
        (TE, norm(X, W, offset=0.5), "got 0.5"),
        (TE, norm(X, W, offset=1.0, cast_first=True), "got 1.0"),
    ],
)
def test_refuses_what_its_kernels_do_not_compute(
    provider: Provider, call: Call, reason: str
) -> None:
    assert str(problem(provider, call)).endswith(reason)


@pytest.mark.parametrize("provider", [LIGER, TE])
def test_other_ops_and_devices_are_not_worth_a_word(provider: Provider) -> None:
    assert isinstance(provider.supports(experts, Call(())), Lacks)
    on_cpu = norm(fake(2, 8, device="cpu"), fake(8, device="cpu"))
    assert isinstance(provider.supports(rms_norm, on_cpu), Lacks)


@pytest.mark.parametrize(
    ("provider", "package"), [(LIGER, "liger_kernel"), (TE, "transformer_engine")]
)
def test_a_missing_package_is_a_reason(
    provider: Provider, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    reason = str(problem(provider, norm(X, W)))
    assert reason.startswith(f"it needs the package {package}, whose import fails: ")
    _, left_out = takers(rms_norm, norm(X, W))
    assert left_out[provider.name] == reason
    monkeypatch.undo()  # whatever a second import would say
    assert problem(provider, norm(X, W)) == reason
    choice = Choice("rms_norm", "torch", left_out=left_out)
    report = Report((Site("a", 1, "rms_norm", "b", "rewritten", timings=(choice,)),), (), 0)
    assert f"No candidate for rms_norm is {provider.name}: {reason}." in str(report).splitlines()


@pytest.mark.usefixtures("installed")
def test_the_gated_mlp_has_silu() -> None:
    unit = mlp_unit()
    assert RaiseMLPs().run(unit) == 1
    _, _, _, _, silu = canonical_node(unit).args[:5]
    weights = (fake(6, 8), fake(6, 8), fake(8, 6))
    assert LIGER.supports(gated_mlp, Call((X, *weights, silu))) is None
    for other in (torch.nn.functional.silu, torch.nn.functional.gelu):
        refusal = LIGER.supports(gated_mlp, Call((X, *weights, other)))
        assert refusal is not None
        assert refusal.reason == "its gated MLP has silu: the activation here is another"


def test_libraries_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    for module in (liger, transformer_engine, quack):
        monkeypatch.setattr(module.importlib, "import_module", loaded.append)
    liger.library("swiglu")
    transformer_engine.library()
    quack.library()
    assert loaded == [
        "liger_kernel.ops.swiglu",
        "transformer_engine.pytorch",
        "transformer_engine_torch",
        "quack.gemm",
    ]


@pytest.mark.usefixtures("installed")
def test_fp8_by_transformer_engine() -> None:
    """Linears are taken by their sizes; experts would wait for the device."""
    weight = fake(128, 256)
    assert TE.supports(fp8_linear, Call((fake(3, 256), weight))) is None
    for options, reason in (
        ({"x": fake(3, 256, dtype=torch.float32)}, "bfloat16: got torch.float32"),
        ({"weight": fake(128, 72)}, "multiples of 16"),
        ({"weight": fake(128, 192), "recipe": "blockwise"}, "multiples of 128"),
    ):
        call = Call((), {"x": fake(3, 256), "weight": weight} | options)
        assert reason in str(TE.supports(fp8_linear, call))
    given = fake(3, 32), fake(3, 2), fake(3, 2), fake(4, 64, 32), fake(4, 32, 32), torch.relu
    found = TE.supports(experts, Call(given, {"recipe": "current"}))
    assert "would wait for the device" in str(found)
    assert isinstance(TE.supports(experts, Call(given)), Lacks)


def block(**changes: Any) -> Call:
    """4 experts of 3 tokens: H = 32, I = 16, Hout = 24."""
    arguments: dict[str, Any] = {
        "x": fake(3, 32),
        "ids": fake(3, 2, dtype=torch.int64),
        "weights": fake(3, 2),
        "up": fake(4, 32, 32),
        "down": fake(4, 24, 16),
        "activation": torch.relu,
    }
    return Call((), arguments | changes)


@pytest.mark.usefixtures("installed")
def test_experts_by_quack(monkeypatch: pytest.MonkeyPatch) -> None:
    biases = {"up_bias": fake(4, 32), "down_bias": fake(4, 24)}
    assert QUACK.supports(experts, block()) is None
    assert QUACK.supports(experts, block(transposed=True, places=fake(5, 0), **biases)) is None
    for changes, reason in (
        ({"recipe": "current"}, "not of FP8: these are"),
        ({"norm": torch.relu}, "a norm comes first here"),
        ({"weigh_input": True}, "they are weighed first here"),
        ({"down": fake(4, 24, 16, dtype=torch.float16)}, "down is torch.float16"),
        ({"up_bias": fake(4, 32, dtype=torch.float32)}, "up_bias is torch.float32"),
        ({"up": fake(4, 36, 32)}, "multiples of 8: up is 36 x 32"),
    ):
        assert str(QUACK.supports(experts, block(**changes))).endswith(reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert str(QUACK.supports(experts, block())).endswith("compute capability 9.0: got 8.0")
    assert isinstance(QUACK.supports(rms_norm, norm(X, W)), Lacks)
    on_cpu = block(x=fake(3, 32, device="cpu"))
    assert isinstance(QUACK.supports(experts, on_cpu), Lacks)


def test_quack_is_imported_for_what_it_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quack", None)  # an import of it fails
    assert "not of FP8: these are" in str(QUACK.supports(experts, block(recipe="current")))
    reason = str(QUACK.supports(experts, block()))
    assert reason.startswith("it needs the package quack, whose import fails: ")
    _, left_out = takers(experts, block())
    assert left_out["quack"] == reason

"""Timings on a GPU, and what was chosen in a compiled model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.ops import experts, rms_norm
from moe_compile.providers import Call
from moe_compile.providers.registry import takers
from moe_compile.timing import Contests
from moe_compile.timing.inputs import Sizes
from tests.families import build
from tests.pairs import inputs, make_pair
from tests.providers.test_torch import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
PACKAGES = {"liger": "liger_kernel", "transformer_engine": "transformer_engine"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPILE_CACHE", str(tmp_path))


def on_gpu() -> nn.Module:
    model: Any = build("qwen3_moe", torch.bfloat16)
    return model.cuda()


def norm_call(rows: int) -> Call:
    x = torch.empty(rows, 2048, dtype=torch.bfloat16, device="cuda")
    return Call((x, x[0].contiguous(), 1e-6), {"cast_first": True})


def experts_call() -> Call:
    x = torch.empty(512, 256, dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros(512, 4, dtype=torch.int64, device="cuda")
    up, down = x.new_empty(8, 256, 256), x.new_empty(8, 256, 128)
    return Call((x, ids, x.new_empty(512, 4), up, down, swiglu))


@pytest.mark.parametrize("options", [None, {"fullgraph": True}])
@pytest.mark.parametrize("name", ["norm", "experts"])
def test_every_candidate_is_timed(name: str, options: dict[str, Any] | None) -> None:
    op, call = (rms_norm, norm_call(8192)) if name == "norm" else (experts, experts_call())
    taking, _ = takers(op, call)
    contests = Contests(torch.device("cuda"), Sizes({}, 1), options=options)
    before = torch.cuda.memory_allocated()
    timing = contests.decide(op, call, taking)
    assert timing.failures == {}
    assert set(timing.milliseconds) == {provider.name for provider in taking}
    assert all(0 < number < 100 for number in timing.milliseconds.values())
    assert torch.cuda.memory_allocated() <= before


def test_more_rows_take_more_time() -> None:
    contests = Contests(torch.device("cuda"), Sizes({}, 1))
    taking, _ = takers(rms_norm, norm_call(8))
    few, many = (contests.decide(rms_norm, norm_call(rows), taking) for rows in (4096, 65536))
    assert many.milliseconds["torch"] > 3 * few.milliseconds["torch"]


@pytest.mark.parametrize("provider", ["torch", "formula", *PACKAGES])
def test_a_compiled_model_with_norms_of_each_provider(provider: str) -> None:
    package = PACKAGES.get(provider, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    config = OptimizeConfig(providers={"rms_norm": provider}, autocast=False)
    models = make_pair(on_gpu(), config)
    sites = moe_compile.report(models.optimized).sites
    norms = [site for site in sites if site.kind == "rms_norm"]
    assert {(site.status, site.provider) for site in norms} == {("rewritten", provider)}
    call = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs().items()}
    losses = [model(**call).loss for model in (models.original, models.optimized)]
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    losses[1].backward()
    assert all(p.grad is not None for p in models.optimized.parameters())


def test_by_default_a_model_is_timed() -> None:
    model = moe_compile.optimize(on_gpu())
    report = moe_compile.report(model)
    timed = [site for site in report.sites if site.kind in ("rms_norm", "experts")]
    assert timed
    for choice in (choice for site in timed for choice in site.timings):
        assert choice.reason is None
        assert len(choice.milliseconds) > 1
    assert report.seconds["timing"] > 0

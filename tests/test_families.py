import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import FAMILIES, build
from tests.pairs import Pair, error, inputs, pair, token_ids
from tests.parity import errors, experts_of, pooled, recorded_routing, too_large

DTYPES = [torch.float32, torch.bfloat16]
matrix = pytest.mark.matrix  # `make families` runs everything, `make test` a sample
FORMS = [
    pytest.param("two rows"),
    pytest.param("one row", marks=matrix),
    pytest.param("padded", marks=matrix),
]
STANCES = [
    pytest.param("force_eager", id="eager"),
    pytest.param("default", id="compiled", marks=matrix),
]

families = pytest.mark.parametrize("family", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
stances = pytest.mark.parametrize("stance", STANCES)
forms = pytest.mark.parametrize("form", FORMS)


def ways(compiled: str) -> pytest.MarkDecorator:
    """Every form in eager mode, and one compiled: what compiles is the same code."""
    eager = [pytest.param("force_eager", *form.values, marks=form.marks) for form in FORMS]
    return pytest.mark.parametrize(
        ("stance", "form"), [*eager, pytest.param("default", compiled, marks=matrix)]
    )


def call_of(form: str, seed: int = 0) -> dict[str, Any]:
    if form == "one row":
        return inputs(batch=1, length=9, seed=seed)
    if form == "two rows":
        return inputs(seed=seed)
    call = inputs(seed=seed)
    mask = torch.ones_like(call["input_ids"])
    mask[0, -3:] = 0
    return call | {"attention_mask": mask, "labels": call["labels"].masked_fill(mask == 0, -100)}


def check_against_float64(
    models: Pair, form: str, dtype: torch.dtype = torch.bfloat16, *, autocast: bool = False
) -> None:
    """Every output and gradient: at most twice the original's own error, or 4 eps of the dtype."""
    floor = 4 * torch.finfo(dtype).eps
    found = errors(models, call_of(form), autocast=autocast)
    if too_large(found, floor):
        draws = [errors(models, call_of(form, seed), autocast=autocast) for seed in range(1, 9)]
        found = pooled(draws)
    assert too_large(found, floor) == {}


def rewritten_owners(model: nn.Module) -> int:
    """How many modules of the model run generated code; a loss is deferred, not generated."""
    sites = [s for s in moe_compile.report(model).sites if s.status == "rewritten"]
    sites = [s for s in sites if s.kind != "loss"]
    return sum({site.module: site.layers for site in sites}.values())


def generated_calls(run: Callable[[], Any]) -> int:
    """How many functions that the library wrote were called."""
    names: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith("<moe_compile"):
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return sum(name.endswith("_forward") for name in names)


@families
@dtypes
def test_every_site_is_rewritten(family: str, dtype: torch.dtype) -> None:
    models = pair(family, dtype, compiled=True)
    sites = moe_compile.report(models.optimized).sites
    assert [site for site in sites if site.status == "refused"] == []
    for kind in ("experts", "rms_norm", "attention"):
        found = [site for site in sites if site.kind == kind]
        assert {site.status for site in found} == {"rewritten"}, kind


@families
def test_every_norm_attention_and_experts_module_has_a_site(family: str) -> None:
    models = pair(family, compiled=True)
    sites = moe_compile.report(models.optimized).sites
    norms = [m for m in models.original.modules() if _is_rms_norm(m)]
    assert sum(s.layers for s in sites if s.kind == "rms_norm") == len(norms)
    attentions = [m for m in models.original.modules() if hasattr(m, "o_proj")]
    assert sum(s.layers for s in sites if s.kind == "attention") == len(attentions)
    assert len(experts_of(models)) > 0


def _is_rms_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__


@families
@ways(compiled="padded")
def test_fp32_is_as_exact_as_the_original(family: str, form: str, stance: Any) -> None:
    models, call = pair(family, compiled=True), call_of(form)
    names = experts_of(models)
    with torch.compiler.set_stance(stance):
        left, right = (
            recorded_routing(model, names, call) for model in (models.optimized, models.original)
        )
        for name in names:
            assert torch.equal(left[name][0], right[name][0]), "routing flipped"
        check_against_float64(models, form, torch.float32)


@families
@ways(compiled="one row")
def test_bf16_is_as_exact_as_the_original(family: str, form: str, stance: Any) -> None:
    with torch.compiler.set_stance(stance):
        check_against_float64(pair(family, torch.bfloat16, compiled=True), form)


@families
@stances
def test_autocast_is_as_exact_as_the_original(family: str, stance: Any) -> None:
    with torch.compiler.set_stance(stance):
        check_against_float64(pair(family, compiled=True), "two rows", autocast=True)


@families
@stances
def test_evaluation(family: str, stance: Any) -> None:
    models = pair(family, compiled=True).copies()
    with torch.no_grad(), torch.compiler.set_stance(stance):
        left, right = (
            model.eval()(token_ids(2, 11), use_cache=False).logits
            for model in (models.optimized, models.original)
        )
    assert error(left, right) < 1e-5


@matrix
@families
@dtypes
@forms
def test_the_rewritten_code_is_what_runs(family: str, dtype: torch.dtype, form: str) -> None:
    model, call = pair(family, dtype, compiled=True).optimized, call_of(form)
    with torch.compiler.set_stance("force_eager"):
        assert generated_calls(lambda: model(**call)) == rewritten_owners(model)


@matrix
@families
@dtypes
@pytest.mark.parametrize("training", [True, False])
def test_the_rewritten_code_runs_under_autocast(
    family: str, dtype: torch.dtype, training: bool
) -> None:
    model = pair(family, dtype, compiled=True).copies().optimized.train(mode=training)
    with torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16):
        calls = generated_calls(lambda: model(token_ids(), use_cache=False))
    assert calls == rewritten_owners(model)


@matrix
@families
def test_the_rewritten_code_runs_in_evaluation(family: str) -> None:
    model = pair(family, compiled=True).copies().optimized.eval()
    with torch.compiler.set_stance("force_eager"):
        calls = generated_calls(lambda: model(token_ids(), use_cache=False))
    assert calls == rewritten_owners(model)


PROVEN = [
    pytest.param(family, dtype, marks=() if sample else matrix)
    for family in FAMILIES
    for dtype in DTYPES
    for sample in [(family, dtype) in {("gpt_oss", torch.float32), ("mixtral", torch.bfloat16)}]
]


@pytest.mark.parametrize(("family", "dtype"), PROVEN)
def test_every_rewrite_is_proven_over_a_prime_field(family: str, dtype: torch.dtype) -> None:
    report = moe_compile.explain(build(family, dtype), config=OptimizeConfig(verify="full"))
    assert [site for site in report.sites if site.status == "refused"] == []


@families
@dtypes
def test_save_and_reload(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    models = pair(family, dtype, compiled=True)
    models.original.save_pretrained(tmp_path / "original")
    models.optimized.save_pretrained(tmp_path / "optimized")
    saved, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("optimized", "original")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "optimized").state_dict()
    original = models.original.state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(tensor, original[key]) for key, tensor in loaded.items())
    back = models.copies().optimized
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    back.load_state_dict(loaded)
    assert all(torch.equal(t, original[key]) for key, t in back.state_dict().items())

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.kernels.normed_rotary import misfit
from moe_compile.ops import CanonicalOp, normed_rotary
from moe_compile.passes import PIPELINE, ChooseProviders, FuseNormedRotary, Lower
from moe_compile.passes.facts import LOWERED, NORMALIZED, NORMED_ROTARY_FUSED, PLANNED
from moe_compile.providers import registry
from moe_compile.providers.provider import Call, Lacks
from moe_compile.providers.torch import TorchProvider
from moe_compile.rewrite.refuse import Refuse
from tests.counting import CountOps
from tests.families import build
from tests.pairs import COMPILED, check_close, inputs, make_pair, step, token_ids
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    canonical_node,
    evaluate,
    normal,
    op_names,
)
from tests.patterns.test_normed_rotary import (
    HEADS,
    WIDTH,
    in_place_of_it,
    normed_used_outside,
    query,
    raised_unit,
)

FUSED = PIPELINE.after("raise_rotary", FuseNormedRotary())


@dataclass(frozen=True)
class Kernel(TorchProvider):
    """The op's kernel on every device; on a CPU it is written in torch."""

    name: str = "kernel"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        if op is not normed_rotary:
            return Lacks("another op")
        arguments = call.arguments(op)
        reason = misfit(*(arguments[name] for name in ("x", "weight", "cos", "sin")))
        return None if reason is None else Refuse(reason)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PROVIDERS", (*registry.PROVIDERS, Kernel()))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("function", [query, in_place_of_it])
def test_fuses(function: Function) -> None:
    unit = raised_unit(function)
    assert FuseNormedRotary().run(unit) == 1
    assert op_names(unit) == ["transpose", "normed_rotary"]
    assert FuseNormedRotary().run(unit) == 0


@pytest.mark.usefixtures("kernel")
def test_gives_its_fact() -> None:
    unit = raised_unit(query)
    assert not NORMED_ROTARY_FUSED.holds(unit.graph)
    FuseNormedRotary().run(unit)
    assert NORMED_ROTARY_FUSED.holds(unit.graph)
    assert NORMALIZED.holds(unit.graph)
    assert FuseNormedRotary.breaks == {LOWERED, PLANNED}
    assert canonical_node(unit).meta["made_by"] == ("fuse_normed_rotary", "normed_rotary")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("function", [query, in_place_of_it])
def test_computes_the_same(function: Function) -> None:
    unit = raised_unit(function)
    given = [normal(BATCH, SEQUENCE, HEADS, WIDTH), *[normal(BATCH, 1, SEQUENCE, WIDTH)] * 2]
    state = {"weight": normal(WIDTH)}
    (want,) = evaluate(unit.graph, given, state)
    for each in (FuseNormedRotary(), ChooseProviders(), Lower()):
        assert each.run(unit) == 1
        (got,) = evaluate(unit.graph, given, state)
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("kernel")
def test_leaves_what_is_used_in_between() -> None:
    unit = raised_unit(normed_used_outside)
    assert FuseNormedRotary().run(unit) == 0
    assert NORMED_ROTARY_FUSED.holds(unit.graph)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("op", ["rms_norm", "rotary"])
def test_leaves_ops_for_which_a_provider_was_asked(op: str) -> None:
    unit = raised_unit(query)
    unit.wanted_providers = {op: "torch"}
    assert FuseNormedRotary().run(unit) == 0
    assert NORMED_ROTARY_FUSED.holds(unit.graph)


def test_leaves_two_ops_where_there_is_no_kernel() -> None:
    unit = raised_unit(query)
    assert FuseNormedRotary().run(unit) == 0
    assert unit.ops() == {"rms_norm": 1, "rotary": 1}
    assert NORMED_ROTARY_FUSED.holds(unit.graph)


FULL = OptimizeConfig(verify="full", autocast=False)
SELECTIVE = dataclasses.replace(
    COMPILED, activation_checkpointing="selective", verify="off", autocast=False
)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("config", [FULL, SELECTIVE], ids=["proven", "compiled"])
def test_a_model_with_norms_of_heads(config: OptimizeConfig) -> None:
    models = make_pair(build("qwen3_moe", num_hidden_layers=2), config, passes=FUSED)
    sites = [s for s in moe_compile.report(models.optimized).sites if s.kind == "rope"]
    assert {(s.pattern, s.status, s.provider) for s in sites} == {
        ("normed_rotary", "rewritten", "kernel")
    }
    with CountOps() as ops:
        values = step(models.optimized, **inputs())
    assert ops.calls["moe_compile::normed_rotary_backward"] == 4
    check_close(values, step(models.original, **inputs()))


@pytest.mark.usefixtures("kernel")
def test_a_module_with_a_hook_is_called_again() -> None:
    models = make_pair(
        build("qwen3_moe", num_hidden_layers=2), OptimizeConfig(verify="off"), passes=FUSED
    )
    seen: list[Tensor] = []
    norm = models.optimized.model.layers[1].self_attn.q_norm
    norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    check_close(step(models.optimized, **inputs()), step(models.original, **inputs()))
    assert len(seen) == 1


@pytest.mark.usefixtures("kernel")
def test_generates_the_same_with_a_cache() -> None:
    models = make_pair(
        build("qwen3_moe", num_hidden_layers=2), OptimizeConfig(verify="off"), passes=FUSED
    )
    mine, theirs = (
        model.eval().generate(token_ids(2, 6), max_new_tokens=8, do_sample=False)
        for model in (models.optimized, models.original)
    )
    assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("kernel")
def test_under_autocast() -> None:
    models = make_pair(
        build("qwen3_moe", num_hidden_layers=2), OptimizeConfig(verify="off"), passes=FUSED
    )
    with torch.autocast("cpu", torch.bfloat16), CountOps() as ops:
        mine = step(models.optimized, **inputs())
    assert ops.calls["moe_compile::normed_rotary"] == 4
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(models.original, **inputs())
    check_close(mine, theirs, 3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_model_on_a_gpu(compile: bool) -> None:
    model: Any = build("qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0, 1])
    models = make_pair(
        model.to("cuda"), OptimizeConfig(compile=compile, measure=False), passes=FUSED
    )
    sites = [s for s in moe_compile.report(models.optimized).sites if s.kind == "rope"]
    assert {(s.pattern, s.status, s.provider) for s in sites} == {
        ("normed_rotary", "rewritten", "torch")
    }
    ids = token_ids().to("cuda")
    call: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    check_close(step(models.optimized, **call), step(models.original, **call), 1e-4)

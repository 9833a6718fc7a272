import copy

import pytest
import torch
from torch import Tensor

import moe_compile
from moe_compile import PIPELINE, OptimizeConfig, ops
from moe_compile.passes import RaiseTopK
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.families import build
from tests.pairs import error, inputs, step
from tests.patterns.harness import Function, unit_of

WITH = PIPELINE.after("raise_experts", RaiseTopK())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_routers_pick_the_same(family: str) -> None:
    model = build(family)
    own = copy.deepcopy(model)
    moe_compile.optimize(model, config=OptimizeConfig(verify="full"), passes=WITH)
    sites = {site.kind: site for site in moe_compile.report(model).sites}
    assert (sites["router"].pattern, sites["router"].status) == ("top_k", "rewritten")
    assert sites["experts"].status == "rewritten"
    found, want = step(model, **inputs()), step(own, **inputs())
    assert found.keys() == want.keys()
    assert {n for n in want if not error(found[n], want[n]) < 2e-6} == set()


def raised(function: Function) -> UnitGraph:
    unit = unit_of(function, x=torch.randn(3, 8))
    RaiseTopK().run(unit)
    return unit


@pytest.mark.parametrize("options", [{}, {"dim": 1}, {"sorted": False}, {"largest": True}])
def test_the_last_dimension(options: dict[str, object]) -> None:
    assert raised(lambda x: x.topk(2, **options)[0]).ops() == {"top_k": 1}


@pytest.mark.parametrize("options", [{"dim": 0}, {"largest": False}])
def test_others_stay(options: dict[str, object]) -> None:
    def other(x: Tensor) -> Tensor:
        return x.topk(2, **options)[0]  # type: ignore[arg-type]

    assert raised(other).ops() == {}


def test_the_order_of_passes() -> None:
    assert ops.OPS["top_k"] is ops.top_k
    with pytest.raises(ValueError, match="'planned', which 'raise_top_k' broke"):
        PIPELINE.after("choose_providers", RaiseTopK())

"""The families of the tests with their experts on two and four ranks."""

import copy

import pytest
import torch.distributed as dist

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import FAMILIES, build
from tests.parallel.models import check_step, optimized
from tests.ranks import on_ranks


def equals_one_process(family: str) -> None:
    """Two ranks have everything rewritten and compiled, four only the experts, in eager mode."""
    two = dist.get_world_size() == 2
    model = build(family)
    reference = copy.deepcopy(model)
    config = OptimizeConfig(compile={"backend": "aot_eager"} if two else False)
    model = optimized(model, "all ep", config, everything=two)
    sites = [s for s in moe_compile.report(model).sites if s.kind == "experts"]
    assert {(s.status, s.provider) for s in sites} == {("rewritten", "all_to_all, torch")}
    check_step(model, reference)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_on_their_ranks(family: str, ranks: int) -> None:
    on_ranks(ranks, equals_one_process, family)

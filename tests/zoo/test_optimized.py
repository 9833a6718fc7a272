"""Every family after `optimize`: what became of its experts, and one training step."""

import copy

import pytest

import moe_compile
from moe_compile import OptimizeConfig
from tests.zoo.entries import Entry, build
from tests.zoo.inputs import call_of
from tests.zoo.steps import step, worst_of
from tests.zoo.test_zoo import RUNNING

SAMPLE = {"gpt_oss", "dbrx"}
TOLERANCE = 1e-5
REFUSED = {
    "jetmoe": "its attention has experts of one product, with attention between two of them",
    "vitpose_backbone": "its rows pick an expert by the data set, not by a router",
}
"""Families of which some experts are refused, and why."""

families = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=() if entry.name in SAMPLE else pytest.mark.matrix)
        for entry in RUNNING
    ],
)


@families
def test_experts_are_rewritten_and_a_step_is_the_same(entry: Entry) -> None:
    original = build(entry)
    # The step is not under autocast; the sample has its forms captured and verified all the same.
    config = OptimizeConfig(compile=False, autocast=entry.name in SAMPLE)
    model = moe_compile.optimize(copy.deepcopy(original), config=config)
    sites = [site for site in moe_compile.report(model).sites if site.kind == "experts"]
    refused = [site.reason for site in sites if site.status != "rewritten"]
    assert bool(refused) == (entry.name in REFUSED), refused
    call = call_of(entry)
    error, name = worst_of(step(model, call), step(original, call))
    assert error < TOLERANCE, name

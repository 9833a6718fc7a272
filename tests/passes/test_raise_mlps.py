from moe_compile.passes import RaiseMLPs
from moe_compile.passes.facts import MLPS_RAISED
from tests.patterns.harness import assert_gives
from tests.patterns.idioms import mlp_unit


def test_gives_its_fact() -> None:
    assert_gives(RaiseMLPs(), mlp_unit(), MLPS_RAISED)

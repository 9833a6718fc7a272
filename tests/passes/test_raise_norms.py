from moe_compile.passes import RaiseNorms
from moe_compile.passes.facts import NORMS_RAISED
from tests.patterns.harness import assert_gives
from tests.patterns.idioms import norm_unit


def test_gives_its_fact() -> None:
    assert_gives(RaiseNorms(), norm_unit(), NORMS_RAISED)

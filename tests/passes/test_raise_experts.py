from moe_compile.passes import RaiseExperts
from moe_compile.passes.facts import EXPERTS_RAISED
from tests.patterns.harness import assert_gives
from tests.patterns.idioms import experts_unit


def test_gives_its_fact() -> None:
    assert_gives(RaiseExperts(), experts_unit(), EXPERTS_RAISED)

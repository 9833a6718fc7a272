import pytest

from moe_compile.passes import RaiseRotary
from moe_compile.passes.facts import ROTARY_RAISED
from tests.patterns.harness import Function, assert_gives
from tests.patterns.idioms import rotary_half, rotary_split, rotary_unit


@pytest.mark.parametrize(("function", "width"), [(rotary_half, 8), (rotary_split, 4)])
def test_gives_its_fact(function: Function, width: int) -> None:
    assert_gives(RaiseRotary(), rotary_unit(function, width), ROTARY_RAISED)

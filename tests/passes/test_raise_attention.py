import pytest

from moe_compile.passes import RaiseAttention
from moe_compile.passes.facts import ATTENTION_RAISED
from tests.patterns.harness import Function, assert_gives
from tests.patterns.idioms import attention_unit, eager_attention, sdpa_attention


@pytest.mark.parametrize(
    ("function", "heads", "masked"), [(sdpa_attention, 4, False), (eager_attention, 2, True)]
)
def test_gives_its_fact(function: Function, heads: int, masked: bool) -> None:
    assert_gives(RaiseAttention(), attention_unit(function, heads, masked=masked), ATTENTION_RAISED)

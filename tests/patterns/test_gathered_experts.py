import pytest

from moe_compile.patterns import GatheredExperts
from tests.patterns.proven import CHOICES, Choice, assert_raised_by, assert_same_sum


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_before_is_raised_and_proven(choice: Choice) -> None:
    assert_raised_by(GatheredExperts(), choice)
    assert_same_sum(GatheredExperts(), choice)

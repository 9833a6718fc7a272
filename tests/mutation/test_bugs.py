from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_can_be_planted(bug: Bug) -> None:
    """The run that plants them is long; that they still fit the code is not."""
    assert (ROOT / bug.file).read_text().count(bug.before) == 1
    assert all((ROOT / test.partition("::")[0]).exists() for test in bug.tests)


def test_they_are_many_and_everywhere() -> None:
    assert len(BUGS) >= 20
    assert max(Counter(bug.what for bug in BUGS).values()) == 1

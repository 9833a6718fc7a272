"""Every family on two ranks, each with half of the experts: one training step.

In a file of its own because a worker of the tests takes whole files.
"""

from tests.ranks import on_ranks
from tests.zoo.entries import Entry
from tests.zoo.expert_parallel import worst_error
from tests.zoo.test_optimized import TOLERANCE, families

@families
def test_a_step_is_that_of_one_process(entry: Entry) -> None:
    for error, name, _ in on_ranks(2, worst_error, entry.name):
        assert error < TOLERANCE, name

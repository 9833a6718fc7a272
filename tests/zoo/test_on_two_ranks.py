"""Every family on two ranks, each with half of the experts: one training step.

In a file of its own because a worker of the tests takes whole files.
"""

import pytest

from tests.ranks import on_ranks
from tests.zoo.entries import Entry
from tests.zoo.expert_parallel import worst_error
from tests.zoo.test_optimized import TOLERANCE, families

TIED = {"diffusion_gemma": "the model got .* and .*, which are one parameter"}
"""What two ranks raise where layers of an encoder and a decoder share parameters."""


@families
def test_a_step_is_that_of_one_process(entry: Entry) -> None:
    if entry.name in TIED:
        with pytest.raises(AssertionError, match=TIED[entry.name]):
            on_ranks(2, worst_error, entry.name)
        return
    for error, name, _ in on_ranks(2, worst_error, entry.name):
        assert error < TOLERANCE, name

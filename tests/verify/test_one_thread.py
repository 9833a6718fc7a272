"""Proofs leave the number of threads as they found it."""

import pytest
import torch

from moe_compile.verify.one_thread import one_thread


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_the_number_of_threads_comes_back() -> None:
    @one_thread()
    def proof() -> None:
        assert torch.get_num_threads() == 1
        raise RuntimeError("a proof failed")

    with pytest.raises(RuntimeError, match="a proof failed"):
        proof()
    assert torch.get_num_threads() == 2

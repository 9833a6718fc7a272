"""Proofs leave the number of threads as they found it."""

import pytest
import torch

from moe_compile.verify.one_thread import one_thread


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="a proof failed"), one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("a proof failed")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

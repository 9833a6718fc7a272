"""Questions on sizes are answered once, and only for sizes of which as much is known."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moe_compile.capture.shadow import Sizes


def test_sizes_that_differ_in_their_names_alone_are_asked_about_once() -> None:
    env = Sizes()
    one, other = env.create_unbacked_symint(), env.create_unbacked_symint()

    assert not bool(one == 0)
    asked = len(env.answers)
    assert not bool(other == 0)

    assert len(env.answers) == asked


def test_what_is_known_of_one_size_is_not_of_another() -> None:
    env = Sizes()
    checked, other = env.create_unbacked_symint(), env.create_unbacked_symint()
    torch._check(checked > 4)

    assert bool(checked > 4)
    with pytest.raises(GuardOnDataDependentSymNode):
        bool(other > 4)

"""Sizes that `nonzero` finds are new ones, known to be as torch knows them."""

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.capture.remembering_mode import RememberingMode


def test_each_tensor_of_a_form_has_a_count_of_its_own_in_the_same_range() -> None:
    env: Any = ShapeEnv()
    mode = RememberingMode(shape_env=env, allow_non_fake_inputs=True)
    with mode:
        masks = [torch.ones(3, 5) > 0 for _ in range(3)]
        found = [mask.nonzero() for mask in masks]
        again, other = masks[2].nonzero(), (torch.ones(7) > 0).nonzero()
    counts: list[Any] = [rows.shape[0] for rows in found]
    symbols = [count.node.expr for count in counts]
    assert len(set(symbols)) == 3
    assert {str(env.var_to_range[symbol]) for symbol in symbols} == {"VR[0, 15]"}
    assert all(symbol in env.size_like for symbol in symbols)
    assert [rows.stride() for rows in found] == [(1, count) for count in counts]
    assert {(rows.dtype, rows.shape[1]) for rows in found} == {(torch.int64, 2)}
    last: Any = again.shape[0]
    assert last.node.expr is symbols[2], "the same tensor has the same count"
    most: Any = other.shape[0]
    assert str(env.var_to_range[most.node.expr]) == "VR[0, 7]"

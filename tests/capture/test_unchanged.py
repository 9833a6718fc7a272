from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.capture.unchanged import Unchanged


class Holder:
    number = 0
    kept: list[Tensor] | None = None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.holder, self.last, self.calls = Holder(), None, 0
        self.register_buffer("load", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.holder.kept = [x]
        self.calls += 1
        self.holder.number += 1
        self.load = x
        self.extra = x
        return x


def test_what_a_forward_leaves_is_forgotten() -> None:
    model = nn.Sequential(Layer())
    with Unchanged(model):
        model(torch.ones(2))
    layer: Any = model[0]
    assert layer.last is layer.holder.kept is None
    assert layer.calls == layer.holder.number == 0
    assert not hasattr(layer, "extra")
    assert not layer.load.any()


def test_tensors_that_were_left_are_named() -> None:
    model = nn.Sequential(Layer(), nn.Linear(2, 2))
    with Unchanged(model) as before:
        assert before.left_on(model[0]) == []
        model(torch.ones(2))
        assert sorted(before.left_on(model[0])) == ["Holder.kept", "extra", "last"]
        assert before.left_on(model[1]) == []

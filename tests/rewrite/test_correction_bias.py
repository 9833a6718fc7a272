"""The bias that corrects a choice of experts is told from all others by where its values go."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.balance import ROUTERS, Routers
from tests.parallel.blocks import HIDDEN, Model

EXPERTS = 4

Route = Callable[["Block", Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Experts in a loop, and a router with two vectors of a number for each expert."""

    two: Tensor

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route: Route = route
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.one = nn.Parameter(torch.randn(EXPERTS), requires_grad=False)
        self.register_buffer("two", torch.randn(EXPERTS))
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8))

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, 1)
        weights, ids = self.route(self, x)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, pick = torch.where(ids == expert)
            rows = (x[token] @ self.up[expert].mT).relu() @ self.down[expert].mT
            out.index_add_(0, token, rows * weights[token, pick, None])
        return out.view(shape)


def for_the_choice(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = block.gate(x).sigmoid()
    ids = (scores + block.one).topk(2).indices
    return scores.gather(1, ids), ids


def a_buffer_in_another_shape(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = block.gate(x).softmax(-1)
    ids = (block.two.unsqueeze(0) + scores).topk(2).indices
    return scores.gather(1, ids), ids


def beside_one_of_the_logits(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = (block.gate(x) + block.two).softmax(-1)
    ids = (scores + block.one).topk(2).indices
    return scores.gather(1, ids), ids


def for_the_weights_too(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = block.gate(x).softmax(-1) + block.one
    weights, ids = scores.topk(2)
    return weights, ids


def multiplied(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = block.gate(x).softmax(-1)
    ids = (scores * block.one).topk(2).indices
    return scores.gather(1, ids), ids


def two_of_them(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = block.gate(x).softmax(-1)
    ids = (scores + block.one + block.two).topk(2).indices
    return scores.gather(1, ids), ids


@pytest.mark.parametrize(
    ("route", "name"),
    [
        (for_the_choice, "one"),
        (a_buffer_in_another_shape, "two"),
        (beside_one_of_the_logits, "one"),
        (for_the_weights_too, None),
        (multiplied, None),
        (two_of_them, None),
    ],
)
def test_by_where_its_values_go(route: Route, name: str | None) -> None:
    model = Model(lambda: Block(route))
    config = OptimizeConfig(verify="off", autocast=False)
    moe_compile.optimize(model, config=config, example_inputs=(torch.randn(2, 5, HIDDEN),))
    known = getattr(model, ROUTERS)
    assert isinstance(known, Routers)
    assert len(known.found) == 2
    for layer, router in enumerate(known.found):
        assert (router.module, router.experts) == (f"layers.{layer}.block", EXPERTS)
        assert router.bias == (None if name is None else f"layers.{layer}.block.{name}")

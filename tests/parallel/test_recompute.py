"""Activation checkpointing on several ranks: nothing is dispatched twice, nothing gathered kept."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile import OptimizeConfig
from tests.counting import CountOps
from tests.pairs import COMPILED, step
from tests.parallel.models import call_of, gathered, no_graph_breaks, optimized, small
from tests.ranks import on_ranks

DISPATCH = "moe_compile::all_to_all_dispatch"
DEAR = ("moe_compile::grouped_mm", "moe_compile::all_to_all_combine")
COLLECT = "moe_compile::collect_rows"
ROUTING = ("aten::topk", "moe_compile::group_picks", DISPATCH)


def counted(model: Any, call: dict[str, Any]) -> tuple[dict[str, Tensor], Counter[str]]:
    step(model, **call)
    with CountOps() as ops:
        values = step(model, **call)
    return gathered(values), ops.calls


def of_mode(model: Any, mesh: str, mode: Any, compile: Any) -> tuple[Any, Counter[str]]:
    config = OptimizeConfig(
        activation_checkpointing=mode, compile=compile, verify="off", autocast=False
    )
    call = call_of(dist.get_rank(), output_router_logits=True)
    return counted(optimized(copy.deepcopy(model), mesh, config), call)


def every_mode(mesh: str, compile: Any) -> None:
    model = small()
    want, once = of_mode(model, mesh, "none", compile)
    for mode in ("full", "selective"):
        values, calls = of_mode(model, mesh, mode, compile)
        assert [n for n, v in values.items() if not torch.equal(v, want[n])] == []
        assert all(calls[op] == once[op] > 0 for op in ROUTING), calls
        # Not to learn how many rows travel back; uncompiled layers run from their beginning.
        assert not compile or calls[COLLECT] == once[COLLECT]
        again = {op for op in DEAR if calls[op] > once[op]}
        assert ("moe_compile::grouped_mm" in again) if mode == "full" else not again


def eager_and_compiled(mesh: str) -> None:
    every_mode(mesh, False)
    with no_graph_breaks():
        every_mode(mesh, COMPILED.compile)


@pytest.mark.parametrize(
    ("mesh", "ranks"), [("ep", 2), pytest.param("dp_shard x ep", 4, marks=pytest.mark.matrix)]
)
def test_routing_and_dispatch_run_once(mesh: str, ranks: int) -> None:
    on_ranks(ranks, eager_and_compiled, mesh)


def hooks_around_experts(mesh: str) -> None:
    """What experts keep goes to the hooks of whoever runs them, but for what was gathered."""
    model = optimized(small(), mesh)
    experts = model.model.layers[0].mlp.experts
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    x = torch.randn(5, 32, requires_grad=True)
    ids, weights = torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x, ids, weights)
    sizes = [tuple(t.shape) for t in packed]
    received, width = 5 * dist.get_world_size(), model.config.intermediate_size
    assert any(width in size and size[0] in (received, 2 * received) for size in sizes), sizes


def test_hooks_of_others_see_what_experts_keep() -> None:
    on_ranks(2, hooks_around_experts, "ep")

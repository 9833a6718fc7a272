"""One rank of 8 to 64, in a process without the others: its graph, shapes and bytes.

Torch's fake process group answers no call, so nothing is computed: a layer is traced, and no more.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import moe_compile
from moe_compile import OptimizeConfig
from tests.parallel.models import call_of, optimized, small
from tests.ranks import on_ranks

EXPERTS = 64


class Traced(Exception):
    """Instead of running what was traced."""


def traced(model: nn.Module, graphs: list[fx.Graph]) -> fx.Graph:
    with pytest.raises(BackendCompilerFailed, match="Traced"):
        model(**call_of(0))
    return graphs.pop()


def bytes_of_experts(model: nn.Module) -> int:
    """What this rank holds of them."""
    own = [p for n, p in model.named_parameters() if "experts" in n]
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in own]
    return sum(t.numel() * t.element_size() for t in parts)


def values(graph: fx.Graph, name: str) -> list[Any]:
    """What the nodes give that call something of this name."""
    return [n.meta["example_value"] for n in graph.nodes if name in str(n.target)]


def check_rank(full: Any, rank: int, ranks: int) -> None:
    graphs: list[fx.Graph] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.graph)
        raise Traced

    config = OptimizeConfig(compile={"backend": backend}, verify="off", autocast=False)
    model = optimized(copy.deepcopy(full), "all ep", config)
    assert moe_compile.report(model).mesh["ep"] == ranks
    assert bytes_of_experts(model) * ranks == bytes_of_experts(full)
    for (name, mine), stored in zip(model.named_parameters(), full.parameters(), strict=True):
        parts = stored.chunk(ranks)
        part = parts[rank] if rank < len(parts) else stored[:0]
        assert torch.equal(mine.to_local(), part), name
    graph = traced(model, graphs)
    ((rows, ids, _, _, _, splits, _),) = values(graph, "all_to_all_dispatch")
    tokens, width = call_of(0)["input_ids"].numel(), full.config.hidden_size
    assert (rows.shape[0], rows.shape[1]) == (ids.shape[0], width)
    assert splits.shape == (2, ranks)
    assert {w.shape[0] for w in values(graph, "to_local")} == {EXPERTS // ranks}
    ((back, _),) = values(graph, "all_to_all_combine")
    assert tuple(back.shape) == (tokens, width)


def each(places: list[tuple[int, int]]) -> None:
    dist.destroy_process_group()
    full = small(num_local_experts=EXPERTS)
    for rank, ranks in places:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        check_rank(full, rank, ranks)
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "places",
    [
        [(5, 8), (33, 64)],
        pytest.param([(0, 8), (15, 16), (16, 32), (0, 64), (63, 64)], marks=pytest.mark.matrix),
    ],
)
def test_one_of_many_ranks(places: list[tuple[int, int]]) -> None:
    on_ranks(1, each, places)

"""Models on meshes, and what one process gives for the data of all ranks."""

import contextlib
import copy
import logging
from collections.abc import Callable, Generator
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile import PIPELINE, OptimizeConfig
from tests.families import build
from tests.pairs import error, inputs, step

MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "ep": ((2,), ("ep",)),
    "dp_shard": ((2,), ("dp_shard",)),
    "dp_shard x ep": ((2, 2), ("dp_shard", "ep")),
    "dp_replicate x ep": ((2, 2), ("dp_replicate", "ep")),
    "dp_replicate x dp_shard x ep": ((2, 2, 2), ("dp_replicate", "dp_shard", "ep")),
}
EXPERTS_ONLY = PIPELINE.without("raise_norms", "raise_rotary", "raise_attention", "raise_mlps")
"""A quick order for tests of what happens around the experts."""

Values = dict[str, Tensor]


def optimized(
    model: nn.Module,
    mesh: str,
    config: OptimizeConfig | None = None,
    *,
    everything: bool = False,
) -> Any:
    """The model on a mesh of all ranks; only its experts are rewritten, or everything is.

    `mesh` is one of `MESHES`, or "all ep".
    """
    shape, names = MESHES.get(mesh, ((dist.get_world_size(),), ("ep",)))
    ranks = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return moe_compile.optimize(
        model, ranks, config, passes=PIPELINE if everything else EXPERTS_ONLY
    )


def small(family: str = "mixtral", **options: Any) -> Any:
    """One layer of experts; the same on every rank."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1} | options
    return build(family, **sizes)


def call_of(rank: int, **options: Any) -> dict[str, Any]:
    """Other data, and another number of tokens, on each rank."""
    return inputs(batch=1 + rank % 2, length=7 + rank, seed=rank) | options


def gathered(values: Values) -> Values:
    """Whole tensors in the place of shards."""
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in values.items()}


def expected(model: Any, calls: list[dict[str, Any]]) -> Values:
    """What one process gives: this rank's loss, and the mean over all ranks of every gradient."""
    every = [step(model, **call) for call in calls]
    mine = every[dist.get_rank()]
    names = [name for name in mine if name not in ("loss", "logits")]
    means = {n: torch.stack([values[n] for values in every]).mean(0) for n in names}
    return {"loss": mine["loss"], "logits": mine["logits"]} | means


def check_step(model: Any, reference: Any, **options: Any) -> None:
    """One step on every rank's own data against one process with all of it."""
    calls = [call_of(rank, **options) for rank in range(dist.get_world_size())]
    want = expected(reference, calls)
    check_equal(gathered(step(model, **calls[dist.get_rank()])), want)


def check_equal(values: Values, references: Values) -> None:
    assert values.keys() == references.keys()
    wrong = {n: error(v, references[n]) for n, v in values.items()}
    assert {n: e for n, e in wrong.items() if not e < 1e-5} == {}


def with_forward(model: Any, forward: Callable[..., Tensor], rank: int) -> Tensor:
    """The loss of another forward of the model."""
    model.forward = MethodType(forward, model)
    try:
        loss: Tensor = model(**call_of(rank))
    finally:
        del model.forward
    return loss


def check_gradients(model: Any, reference: Any, loss: Callable[[Any, int], Tensor]) -> None:
    """Those of a loss of every rank's own data against the mean of one process's."""

    def gradients(each: Any, rank: int) -> dict[str, Tensor]:
        each.zero_grad()
        loss(each, rank).backward()
        return {n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}

    found = gathered(gradients(model, dist.get_rank()))
    every = [gradients(reference, rank) for rank in range(dist.get_world_size())]
    assert found.keys() == every[0].keys()
    for name, value in found.items():
        assert error(value, torch.stack([each[name] for each in every]).mean(0)) < 1e-5, name


def both(mesh: str, model: Any, config: OptimizeConfig | None = None) -> tuple[Any, Any]:
    """The model on a mesh, and an untouched copy."""
    reference = copy.deepcopy(model)
    return optimized(model, mesh, config), reference


@contextlib.contextmanager
def no_graph_breaks() -> Generator[None]:
    """Fails if Dynamo breaks a graph inside, or a layer runs uncompiled, which is a warning."""
    counters.clear()
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logger = logging.getLogger("moe_compile")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert logs == [], logs
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["graph_break"] == {}, counters["graph_break"]

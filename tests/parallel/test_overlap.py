"""Overlapped communication: the same losses and gradients as without, in every way of running."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import moe_compile
from moe_compile import OptimizeConfig, Pass
from moe_compile.kernels import in_flight
from moe_compile.passes import ChunkTokens, OverlapSharedExperts
from tests.counting import CountOps
from tests.pairs import COMPILED, error, step
from tests.parallel.models import (
    EXPERTS_ONLY,
    MESHES,
    call_of,
    check_step,
    gathered,
    no_graph_breaks,
    small,
)
from tests.ranks import on_ranks

WIDTH = 40  # of each expert, and of nothing beside them
SHARED: dict[str, Any] = {
    "family": "deepseek_v3",
    "first_k_dense_replace": 0,
    "moe_intermediate_size": WIDTH,
}
STEPS = "dispatch starts | shared_experts | dispatch waits | experts | combine starts"
ONCE = ("aten::topk", "moe_compile::group_picks")
Values = dict[str, Tensor]


def overlapped(model: nn.Module, *steps: Pass, mesh: str = "ep", **options: Any) -> Any:
    shape, names = MESHES[mesh]
    ranks = init_device_mesh("cpu", shape, mesh_dim_names=names)
    given: dict[str, Any] = {"compile": False, "verify": "off", "autocast": False} | options
    config = OptimizeConfig(**given)
    passes = EXPERTS_ONLY.after("dispatch_experts", *steps)
    return moe_compile.optimize(copy.deepcopy(model), ranks, config, passes=passes)


def run(model: nn.Module) -> tuple[Values, Counter[str]]:
    """A step of other data, and another number of tokens, on each rank; and what ran in it."""
    call = call_of(dist.get_rank())
    with CountOps() as ops:
        values = step(model, **call)
    assert in_flight.count() == 0
    return gathered(values), ops.calls


def differences(values: Values, references: Values) -> dict[str, float]:
    assert values.keys() == references.keys()
    return {
        n: error(v, references[n]) for n, v in values.items() if not torch.equal(v, references[n])
    }


def check_chunks(values: Values, references: Values) -> None:
    """Products of fewer rows, and gradients in several sums, round in another way."""
    assert {n: e for n, e in differences(values, references).items() if not e < 2e-6} == {}


def shared_experts() -> None:
    """Bit for bit, while tokens travel, and while results do; in chunks, within rounding."""
    model = small(**SHARED)
    want = run(overlapped(model))[0]
    made = overlapped(model, OverlapSharedExperts(), verify="full")
    check_report(made, f"{STEPS} | combine waits")
    assert differences(run(made)[0], want) == {}
    check_order(made)
    late = overlapped(model, OverlapSharedExperts("combine"))
    check_report(late, f"{STEPS} | combine waits".replace(" | shared_experts", "", 1), late=True)
    assert differences(run(late)[0], want) == {}
    both = overlapped(model, ChunkTokens(2), OverlapSharedExperts())
    assert "dispatch 1 starts | shared_experts | dispatch 0 waits" in schedule(both)
    check_chunks(run(both)[0], want)
    with no_graph_breaks():
        want = run(overlapped(model, compile=COMPILED.compile))[0]
        made = overlapped(model, OverlapSharedExperts(), compile=COMPILED.compile)
        assert differences(run(made)[0], want) == {}
        check_order(made)


def schedule(model: nn.Module) -> str:
    found = moe_compile.report(model)
    ((_, steps),) = found.schedules.items()
    assert found.to_json()["mesh"]["schedules"] == found.schedules
    assert f"Schedule of model.layers.0.mlp: {steps}." in str(found)
    return steps


def check_report(model: nn.Module, steps: str, *, late: bool = False) -> None:
    if late:
        steps = steps.replace("combine starts", "combine starts | shared_experts")
    assert schedule(model) == steps
    (site,) = [s for s in moe_compile.report(model).sites if s.kind == "experts"]
    assert (site.module, site.status) == ("model.layers.0.mlp", "rewritten")
    assert site.provider == "all_to_all, torch"


class Order(TorchDispatchMode):
    """The starts and waits inside, and the shared expert's products."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("moe_compile::all_to_all_")
        if name.startswith(("start_", "wait_")):
            self.names.append(name)
        if name == "aten::mm" and WIDTH in (*args[0].shape, *args[1].shape):
            self.names += ["shared"] if self.names[-1:] != ["shared"] else []
        return result


def check_order(model: Any) -> None:
    """The shared expert runs, forward and backward, while tokens or their gradients travel."""
    with Order() as order:
        step(model, **call_of(dist.get_rank()))
    assert order.names == [
        *("start_dispatch", "shared", "wait_dispatch", "start_combine", "wait_combine"),
        *("start_redispatch", "wait_redispatch", "start_combine", "shared", "wait_combine"),
    ], order.names


def recomputed(compile: Any) -> None:
    """Routing and dispatch run once; with `selective` nothing that is dear runs twice."""
    model, steps = small(**SHARED), (ChunkTokens(2), OverlapSharedExperts())
    once = run(overlapped(model, *steps, compile=compile))
    for mode in ("full", "selective"):
        made = overlapped(model, *steps, compile=compile, activation_checkpointing=mode)
        values, calls = run(made)
        assert differences(values, once[0]) == {}
        kept = [*ONCE, *(f"moe_compile::all_to_all_{op}_dispatch" for op in ("start", "wait"))]
        if mode == "selective":
            kept += [f"moe_compile::all_to_all_{op}_combine" for op in ("start", "wait")]
            kept.append("moe_compile::grouped_mm")
        assert {op: calls[op] for op in kept} == {op: once[1][op] for op in kept}
        assert all(once[1][op] > 0 for op in kept)


def chunks() -> None:
    """Without shared experts: also fewer tokens than chunks, and a rank that has none."""
    model = small()
    want = run(overlapped(model))[0]
    made = overlapped(model, ChunkTokens(3), OverlapSharedExperts(), verify="full")
    (site,) = [s for s in moe_compile.report(made).sites if s.kind == "experts"]
    assert (site.module, site.status) == ("model.layers.0.mlp.experts", "rewritten")
    assert "nothing is moved: no module around its experts" in str(moe_compile.report(made))
    check_chunks(run(made)[0], want)
    experts, rank = made.model.layers[0].mlp.experts, dist.get_rank()
    plain = overlapped(model).model.layers[0].mlp.experts
    for tokens in (0, 1, 2, 5 * rank):
        check_chunks(alone(experts, tokens), alone(plain, tokens))
    check_turns(made)
    with no_graph_breaks():
        compiled = overlapped(model, ChunkTokens(3), compile=COMPILED.compile)
        check_chunks(run(compiled)[0], want)
        check_turns(compiled)


def check_turns(model: Any) -> None:
    """While the experts of a chunk compute, another chunk travels, forward and backward."""
    there, arrived, back = "start_dispatch", "wait_dispatch", "start_combine"
    forward = [there, there, arrived, back, there, arrived, back, arrived, back]
    with Order() as order:
        step(model, **call_of(dist.get_rank()))
    assert order.names[:12] == [*forward, *["wait_combine"] * 3], order.names
    on_the_way, beside = 0, list[int]()  # in the backward, when gradients of experts are computed
    for name in order.names[12:]:
        beside += [on_the_way] if name == back else []
        on_the_way += 1 if name.startswith("start") else -1
    assert (beside, on_the_way) == ([2, 2, 1], 0), order.names


def alone(experts: nn.Module, tokens: int) -> Values:
    """The experts of a layer with a number of tokens."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 32, generator=generator, requires_grad=True)
    ids = torch.randint(4, (tokens, 1), generator=generator)
    ids = torch.cat((ids, (ids + 1) % 4), 1)
    weights = torch.rand(tokens, 2, generator=generator, requires_grad=True)
    experts.zero_grad()
    out: Tensor = experts(x, ids, weights)
    out.square().sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    values = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    return values | gathered(
        {n: p.grad for n, p in experts.named_parameters() if p.grad is not None}
    )


def other_passes() -> None:
    """All ranks must overlap alike."""
    steps = [ChunkTokens(2 + dist.get_rank())]
    with pytest.raises(ValueError, match="different plans on its ranks"):
        overlapped(small(), *steps)


def on_two() -> None:
    shared_experts()
    chunks()
    other_passes()


def compiled_and_recomputed() -> None:
    with no_graph_breaks():
        recomputed(COMPILED.compile)


def on_four() -> None:
    """Against one process with all data, where the experts' weights are gathered for each chunk."""
    model = small(**SHARED)
    made = overlapped(model, ChunkTokens(2), OverlapSharedExperts(), mesh="dp_shard x ep")
    check_step(made, model)


def test_every_way_of_running() -> None:
    on_ranks(2, on_two)


def test_recomputation_dispatches_once() -> None:
    on_ranks(2, recomputed, False)


@pytest.mark.matrix
def test_compiled_recomputation_dispatches_once() -> None:
    on_ranks(2, compiled_and_recomputed)


def test_on_four_ranks() -> None:
    on_ranks(4, on_four)

"""Loss and every gradient on every kind of mesh, each rank with other data."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

import moe_compile
from tests.pairs import COMPILED, error, step
from tests.parallel.models import (
    MESHES,
    both,
    call_of,
    check_equal,
    check_step,
    expected,
    gathered,
    no_graph_breaks,
    small,
)
from tests.ranks import on_ranks

SLOW = {"dp_replicate x ep", "dp_replicate x dp_shard x ep"}
meshes = pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=pytest.mark.matrix if m in SLOW else ()) for m in MESHES]
)


def ranks_of(mesh: str) -> int:
    return math.prod(MESHES[mesh][0])


def equals_one_process(mesh: str) -> None:
    model, reference = both(mesh, small())
    check_step(model, reference)
    check_step(model, reference, output_router_logits=True)
    check_accumulation(model, reference)
    check_clipping(model, reference)
    check_joined_batch(model, reference)
    if "ep" in mesh:
        check_whole_matrices(model, reference)
    check_optimizers(model, reference)
    check_compiled(mesh)
    if mesh == "dp_shard x ep":
        # Two ranks share one expert, so each has some of its rows.
        weight = check_compiled(mesh, num_local_experts=2).model.layers[0].mlp.experts.down_proj
        assert weight.placements == (Shard(0), Shard(1))


def check_compiled(mesh: str, **options: Any) -> Any:
    """The same step, plain and recomputed, where every layer is one graph."""
    model, reference = both(mesh, small(**options), COMPILED)
    with no_graph_breaks():
        check_step(model, reference)
        model.gradient_checkpointing_enable()
        check_step(model, reference)
    return model


def check_joined_batch(model: Any, reference: Any) -> None:
    """Every token counts the same, on whatever rank it is, and some have no label."""
    ranks = dist.get_world_size()
    calls = [padded(call_of(rank), 1 + 2 * rank) for rank in range(ranks)]
    count = sum(int((call["labels"][:, 1:] != -100).sum()) for call in calls)
    losses = [token_losses(reference, call).sum() / count for call in calls]
    reference.zero_grad()
    torch.stack(losses).sum().backward()
    model.zero_grad()
    loss = model(**calls[dist.get_rank()], num_items_in_batch=count).loss
    assert error(loss.detach(), losses[dist.get_rank()].detach()) < 1e-5
    (loss * ranks).backward()
    check_equal(gathered(gradients(model)), gradients(reference))


def padded(call: dict[str, Any], count: int) -> dict[str, Any]:
    """The call with padding in the place of the first row's last tokens."""
    ids, labels = call["input_ids"].clone(), call["labels"].clone()
    mask = torch.ones_like(ids)
    ids[0, -count:], mask[0, -count:], labels[0, -count:] = 0, 0, -100
    return call | {"input_ids": ids, "labels": labels, "attention_mask": mask}


def token_losses(model: Any, call: dict[str, Any]) -> Tensor:
    logits = model(**call | {"labels": None}).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), call["labels"][:, 1:].flatten(), reduction="none")


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_accumulation(model: Any, reference: Any) -> None:
    """Two micro-batches before the optimizer: gradients add up."""
    rounds = [[call_of(rank + 3 * i) for rank in range(dist.get_world_size())] for i in range(2)]
    wants = [expected(reference, calls) for calls in rounds]
    model.zero_grad()
    for calls in rounds:
        model(**calls[dist.get_rank()]).loss.backward()
    got = gathered(gradients(model))
    check_equal(got, {n: wants[0][n] + wants[1][n] for n in got})


def check_clipping(model: Any, reference: Any) -> None:
    """The norm, and the scaled gradients, are those of one process."""
    calls = [call_of(rank) for rank in range(dist.get_world_size())]
    want = expected(reference, calls)
    for name, parameter in reference.named_parameters():
        parameter.grad = want[name].clone()
    step(model, **calls[dist.get_rank()])
    theirs = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    mine = moe_compile.clip_grad_norm_(model, 0.1)
    assert error(mine, theirs) < 1e-6
    check_equal(gathered(gradients(model)), gradients(reference))


def check_optimizers(model: Any, reference: Any) -> None:
    every: list[dict[str, Any]] = [{"fused": True}, {"foreach": True}, {}]
    for options in every:
        for each in (model, reference):
            torch.optim.AdamW(each.parameters(), lr=1e-3, eps=1e-3, **options).step()
        state = reference.state_dict()
        check_equal(gathered(model.state_dict()), state)


def check_whole_matrices(model: Any, reference: Any) -> None:
    """An optimizer that works on matrices, such as Muon, finds whole ones in every shard."""
    theirs = {n: orthogonal(p.grad) for n, p in reference.named_parameters() if p.dim() == 3}
    for name, parameter in model.named_parameters():
        if name in theirs:
            shard = orthogonal(parameter.grad.to_local())
            gradient = parameter.grad
            whole = DTensor.from_local(shard, gradient.device_mesh, gradient.placements)
            assert error(whole.full_tensor(), theirs[name]) < 1e-4


def orthogonal(matrices: Tensor) -> Tensor:
    """A step of Newton and Schulz for each matrix, as Muon takes it."""
    unit = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    return 1.5 * unit - 0.5 * unit @ unit.mT @ unit


@meshes
def test_one_step_equals_one_process(mesh: str) -> None:
    on_ranks(ranks_of(mesh), equals_one_process, mesh)

"""The experts alone on two and four ranks: with any number of tokens, on any rank."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_compile import OptimizeConfig
from moe_compile.parallel.experts import placements_of, whole_experts
from tests.pairs import error
from tests.parallel.models import both, call_of, small
from tests.ranks import on_ranks

HIDDEN, EXPERTS = 32, 4
PICKS: dict[str, list[list[list[int]]]] = {
    "other tokens on each rank": [[[0, 1], [2, 3]], [[3, 0], [1, 2], [0, 2]]],
    "a rank without tokens": [[[0, 3], [1, 2]], []],
    "no tokens on any rank": [[], []],
    "a rank whose experts nobody picks": [[[0, 1]], [[1, 0], [0, 1]]],
    "experts that nobody picks": [[[0, 2]], [[2, 0]]],
}


def arguments(picks: list[list[int]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(picks), HIDDEN, generator=generator)
    weights = torch.rand(len(picks), 2, generator=generator)
    return [x, torch.tensor(picks, dtype=torch.int64).reshape(-1, 2), weights]


def run(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Any]:
    """Output and gradients of tokens, weights and parameters."""
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    out = module(leaves[0], ids, leaves[1])
    module.zero_grad()
    (out.square().sum() + out.sum()).backward()
    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    return [*found, *(p.grad for p in module.parameters())]


def equals_one_process(mesh: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, reference = both(mesh, small())
    ours, theirs = (m.model.layers[0].mlp.experts for m in (model, reference))
    for (case, two), training in itertools.product(PICKS.items(), (True, False)):
        picks = two if ranks == 2 else [*two, *reversed(two)]
        ours.train(training)
        every = [run(theirs, *arguments(part, seed)) for seed, part in enumerate(picks)]
        weights = zip(*(values[3:] for values in every), strict=True)
        want = [*every[rank][:3], *(torch.stack(parts).sum(0) / ranks for parts in weights)]
        got = run(ours, *arguments(picks[rank], rank))
        for mine, wanted in zip(got, want, strict=True):
            assert mine is not None, f"{case}: an expert without tokens has no gradient"
            whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
            assert error(whole, wanted) < 1e-5, case


def other_forms() -> None:
    model, _ = both("ep", small())
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = arguments([[0, 1]], 0)
    with pytest.raises(RuntimeError, match="called in a form that was not captured"):
        experts(x.double(), ids, weights)
    experts.register_forward_hook(lambda *_: None)
    experts(x, ids, weights)


def on_two_ranks() -> None:
    equals_one_process("ep")
    other_forms()


def test_any_number_of_tokens_and_no_other_form() -> None:
    on_ranks(2, on_two_ranks)


def on_four_ranks() -> None:
    shards()
    equals_one_process("dp_shard x ep")


def shards() -> None:
    """The shards of a stack whose experts divide among all ranks, and of one whose do not."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("ep", "dp_shard"))
    assert placements_of(torch.empty(8, 6, 4), mesh) == [Shard(0), Shard(0)]
    assert placements_of(torch.empty(6, 6, 4), mesh) == [Shard(0), Shard(1)]
    flat = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("ep",))
    assert placements_of(torch.empty(8, 6, 4), flat) == [Shard(0)]
    for count in (8, 6):
        full = torch.arange(count * 12.0).view(count, 3, 4)
        check_whole_experts(full, mesh)


def check_whole_experts(full: Tensor, mesh: DeviceMesh) -> None:
    """Each rank gets its experts whole; the gradient is the sum over the ranks that have them."""
    sharded = DTensor.from_local(full, mesh, [Replicate(), Replicate()])
    weight: Any = sharded.redistribute(placements=placements_of(full, mesh)).requires_grad_()
    own = whole_experts(weight)
    size, first = len(full) // 2, mesh.get_local_rank("ep") * len(full) // 2
    assert torch.equal(own, full[first : first + size])
    (own * (1 + dist.get_rank())).sum().backward()
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements
    # Ranks 0 and 1 share the first half of the experts, 2 and 3 the second.
    want = torch.full_like(full, 1 + 2)
    want[size:] = 3 + 4
    assert torch.equal(weight.grad.full_tensor(), want)


def test_shards_and_any_number_of_tokens() -> None:
    on_ranks(4, on_four_ranks)


def kept_bytes(mesh: str, compiled: bool) -> tuple[int, int]:
    """The bytes that autograd keeps of tensors as large as a rank's experts, and of one shard."""
    config = OptimizeConfig(compile={"backend": "aot_eager"} if compiled else False)
    model, _ = both(mesh, small(), config)
    shard = model.model.layers[0].mlp.experts.gate_up_proj
    size = shard.numel() // 2
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**call_of(dist.get_rank()))
    return sum(count == size for count in kept), shard.to_local().numel() * 4


def gathered_is_not_kept() -> None:
    for compiled in (False, True):
        assert kept_bytes("dp_shard x ep", compiled)[0] == 0


@pytest.mark.matrix
def test_gathered_experts_are_not_kept_for_the_backward() -> None:
    on_ranks(4, gathered_is_not_kept)

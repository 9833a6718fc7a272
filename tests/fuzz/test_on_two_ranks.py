"""Random blocks on two ranks, each with half of the experts and its own tokens."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.fuzz.draw import draw
from moe_compile.fuzz.judge import difference
from moe_compile.fuzz.load import load
from moe_compile.fuzz.spec import BlockSpec
from tests.ranks import on_ranks

RANKS = 2
SAMPLE = [
    4,
    pytest.param(24, marks=pytest.mark.matrix),
    pytest.param(480, marks=pytest.mark.long),
]
AT_ONCE = 24
"""Blocks of one pair of processes."""


@pytest.mark.parametrize("blocks", SAMPLE)
def test_a_step_is_that_of_one_process(blocks: int) -> None:
    divisible = (seed for seed in itertools.count() if draw(seed).experts % RANKS == 0)
    seeds = list(itertools.islice(divisible, blocks))
    judgements = [
        on_ranks(RANKS, judged, seeds[start : start + AT_ONCE])[0]
        for start in range(0, blocks, AT_ONCE)
    ]
    assert [problems for _, problems in judgements if problems] == []
    assert sum(spread for spread, _ in judgements) > blocks // 2


def judged(seeds: list[int]) -> tuple[int, dict[int, str]]:
    """How many blocks have spread experts, and what is wrong with which."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    spread, problems = 0, dict[int, str]()
    for spec in map(draw, seeds):
        model = load(spec)
        reference = copy.deepcopy(model)
        config = OptimizeConfig(compile=False, verify="off", autocast=False)
        moe_compile.optimize(model, mesh, config, example_inputs=(tokens(spec, RANKS),))
        sites = [s for s in moe_compile.report(model).sites if s.kind == "experts"]
        spread += any("all_to_all" in (site.provider or "") for site in sites)
        found = step(model, tokens(spec, dist.get_rank()))
        problem = difference(expected(reference, spec), found)
        if problem is not None:
            problems[spec.seed] = problem
    return spread, problems


def tokens(spec: BlockSpec, rank: int) -> Tensor:
    """Other tokens on each rank, and another number of them."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1 + rank, 5 + rank, spec.hidden, generator=generator)


def expected(model: nn.Module, spec: BlockSpec) -> dict[str, Tensor]:
    """This rank's outputs and its tokens' gradient, and every parameter's mean gradient."""
    every = [step(model, tokens(spec, rank)) for rank in range(RANKS)]
    means = {
        name: torch.stack([values[name] for values in every]).mean(0)
        for name, _ in model.named_parameters()
    }
    return every[dist.get_rank()] | means


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients of their squares, by name; whole tensors."""
    model.zero_grad()
    x.requires_grad_()
    leaves = [y for y in pytree.tree_leaves(model(x)) if isinstance(y, Tensor)]
    outputs = {f"output {i}": y for i, y in enumerate(leaves) if y.is_floating_point()}
    sum(y.square().mean() for y in outputs.values() if y.requires_grad).backward()  # type: ignore[union-attr]
    gradients: dict[str, Any] = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    assert x.grad is not None
    return {name: y.detach() for name, y in outputs.items()} | whole | {"the input": x.grad}

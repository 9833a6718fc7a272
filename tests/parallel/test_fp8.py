"""FP8 on two ranks: what each rank's tokens give on one process, whoever has the experts."""

import copy

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.passes import QuantizeToFP8
from tests.pairs import COMPILED, error, step
from tests.parallel.models import EXPERTS_ONLY, MESHES, call_of, expected, gathered, small
from tests.ranks import on_ranks

PASSES = EXPERTS_ONLY.before("choose_providers", QuantizeToFP8())


def one_step(mesh: str) -> None:
    """A scale is that of a rank's own tokens; FSDP2 gathers the weights as they are."""
    model = small(intermediate_size=64)
    config = OptimizeConfig(autocast=False, compile=False)
    alone = moe_compile.optimize(copy.deepcopy(model), config=config, passes=PASSES)
    calls = [call_of(rank) for rank in range(dist.get_world_size())]
    want = expected(alone, calls)
    shape, names = MESHES[mesh]
    ranks = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for compiled in (False, COMPILED.compile):
        config = OptimizeConfig(autocast=False, compile=compiled)
        made = moe_compile.optimize(copy.deepcopy(model), ranks, config, passes=PASSES)
        report = moe_compile.report(made)
        assert {s.kind for s in report.sites if s.numerics} == {"linear", "experts"}
        got = gathered(step(made, **calls[dist.get_rank()]))
        assert got.keys() == want.keys()
        # Sums in another order may round an operand to its other neighbour.
        assert {n: e for n, v in got.items() if not (e := error(v, want[n])) < 2e-3} == {}


@pytest.mark.parametrize("mesh", ["ep", "dp_shard"])
def test_one_step(mesh: str) -> None:
    on_ranks(2, one_step, mesh)

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.parallel.limits import limit_picks, limit_places
from moe_compile.passes import ChunkTokens, LimitPicks, OverlapSharedExperts
from moe_compile.rewrite.pipeline import Pass
from tests import deep_ep_emulator
from tests.pairs import COMPILED, error, step
from tests.parallel.models import EXPERTS_ONLY, call_of, gathered, small
from tests.ranks import on_ranks

BOUND = 32  # of tokens that a rank brings
ENOUGH = 80  # of 2 ranks, 32 tokens and 2 picks: 128 in the worst case


def limited(*steps: Pass, dispatcher: str = "deepep", compiled: bool = False) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    config = OptimizeConfig(
        dispatcher=dispatcher,  # type: ignore[arg-type]
        max_tokens_per_rank=BOUND,
        compile=COMPILED.compile if compiled else False,
        verify="full",
    )
    passes = EXPERTS_ONLY.after("dispatch_experts", *steps)
    model = small(hidden_size=128).bfloat16()
    made = moe_compile.optimize(model, mesh, config, passes=passes)
    (site,) = [s for s in moe_compile.report(made).sites if s.kind == "experts"]
    assert site.status == "rewritten", site.reason
    return made


class Rows(TorchDispatchMode):
    """For how many picks the experts have rows."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "moe_compile::group_picks":
            self.found.add(args[2])
        return func(*args, **(kwargs or {}))


def fewer_rows() -> None:
    deep_ep_emulator.install()
    for steps, rows in (((), 2 * 2 * BOUND), ((LimitPicks(ENOUGH),), ENOUGH)):
        model = limited(*steps)
        with Rows() as seen:
            step(model, **call_of(dist.get_rank()))
        assert seen.found == {rows}


def same_steps() -> None:
    deep_ep_emulator.install()
    call = call_of(dist.get_rank())
    for dispatcher, compiled, *steps in (
        ("deepep", False, LimitPicks(ENOUGH)),
        ("deepep", True, LimitPicks(ENOUGH)),
        ("all_to_all", False, LimitPicks(ENOUGH)),
        ("deepep", False, ChunkTokens(2), LimitPicks(ENOUGH)),
        ("deepep", False, LimitPicks(ENOUGH), OverlapSharedExperts()),
    ):
        options = {"dispatcher": dispatcher, "compiled": compiled}
        want = gathered(step(limited(*steps[:-1], **options), **call))  # type: ignore[arg-type]
        found = gathered(step(limited(*steps, **options), **call))  # type: ignore[arg-type]
        assert found.keys() == want.keys()
        assert {n for n in want if error(found[n], want[n]) > 1e-6} == set()


def too_many() -> None:
    deep_ep_emulator.install()
    call = call_of(dist.get_rank())
    for compiled in (False, True):
        model = limited(LimitPicks(3), compiled=compiled)
        with pytest.raises(RuntimeError, match="more than the 3 picks that LimitPicks promised"):
            step(model, **call)


def test_rows_for_fewer_picks_change_nothing() -> None:
    on_ranks(2, same_steps)


def test_there_are_fewer_rows() -> None:
    on_ranks(2, fewer_rows)


def test_more_picks_than_promised() -> None:
    on_ranks(2, too_many)


def test_the_ops() -> None:
    ids = torch.tensor([[0, -1], [1, 2]])
    assert torch.equal(limit_picks(ids, 3), ids)
    with pytest.raises(RuntimeError, match="more than the 2 picks"):
        limit_picks(ids, 2)
    torch.library.opcheck(torch.ops.moe_compile.limit_picks.default, (ids, 3))
    assert limit_places(torch.empty(4, 0), 3).shape == (3, 0)
    assert limit_places(torch.empty(4, 0), 5).shape == (4, 0)

"""What DeepEP V2 does otherwise: bounds, buffers that grow, the order of rows, its emulation."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.kernels.deep_ep import BUFFERS, destroy_buffers
from moe_compile.kernels.deep_ep_elastic import (
    elastic_combine,
    elastic_dispatch,
    elastic_redispatch,
)
from tests import deep_ep_elastic_emulator as emulator
from tests.kernels.dispatching import CASES, EXPERTS, group, tokens_of
from tests.ranks import on_ranks

HIDDEN = 256
NUMBERS = 6  # the place of experts, bound and SMs among the outputs of a dispatch


def tokens_with(case: str) -> tuple[Tensor, Tensor, Tensor]:
    x, ids, weights = tokens_of(case, dist.get_rank(), HIDDEN, torch.bfloat16)
    return x, ids, weights.float()


def send(x: Tensor, ids: Tensor, weights: Tensor, bound: int | None = None) -> tuple[Tensor, ...]:
    return elastic_dispatch(x, ids, weights, EXPERTS, group(), bound)


def opcheck(bound: int | None = None) -> None:
    emulator.install()
    # Two runs are compared, also the places of the rows in the buffer, and what nothing wrote.
    emulator.ElasticBuffer.is_random = False
    emulator.ElasticBuffer.unwritten = 7.0
    x, ids, weights = tokens_with("uneven")
    x.requires_grad_()
    weights.requires_grad_()
    outputs = send(x, ids, weights, bound)
    assert all(t.is_contiguous() and t.storage_offset() == 0 for t in outputs)
    handle, y = list(outputs[4:]), outputs[0].detach().requires_grad_()
    torch.library.opcheck(elastic_dispatch, (x, ids, weights, EXPERTS, group(), bound))
    torch.library.opcheck(elastic_combine, (y, None, handle, group()))
    torch.library.opcheck(elastic_combine, (y.detach(), outputs[2].detach(), handle, group()))
    torch.library.opcheck(elastic_redispatch, (x.detach(), handle, group()))


def opcheck_with_a_bound() -> None:
    opcheck(60)


def padding() -> None:
    """With a bound rows come as without, and behind them those that did not come."""
    emulator.install()
    for case in CASES:
        x, ids, weights = tokens_with(case)
        exact, bounded = send(x, ids, weights), send(x, ids, weights, 60)
        real, handle = len(exact[0]), list(bounded[4:])
        assert handle[NUMBERS - 4].tolist() == [EXPERTS, 60, 4]
        assert len(bounded[0]) == 120
        assert exact[3].shape == ((exact[1] >= 0).sum(), 0)
        assert bounded[3].shape == (bounded[1].numel(), 0)
        for one, other in zip(exact[:3], bounded[:3], strict=True):
            assert torch.equal(one, other[:real])
        assert bool(bounded[0][real:].isnan().all())
        assert bool((bounded[1][real:] == -1).all())
        assert bool((bounded[2][real:] == 0).all())
        again = elastic_redispatch(x, handle, group())
        assert torch.equal(again[:real], exact[0])
        back = elastic_combine(bounded[0], bounded[2], handle, group())
        want = elastic_combine(exact[0], exact[2], list(exact[4:]), group())
        assert all(torch.equal(*pair) for pair in zip(back, want, strict=True))


def buffers() -> None:
    """One buffer for the group; it grows for all ranks when one rank brings more tokens."""
    emulator.install()
    old = send(*tokens_with("uneven"))
    assert old[NUMBERS].tolist() == [EXPERTS, 256, 4]
    (first,) = BUFFERS.values()
    many = 2049 if dist.get_rank() == 1 else 0
    ids = torch.arange(many)[:, None] % EXPERTS
    rows, _, _, _, *handle = send(torch.ones(many, HIDDEN).bfloat16(), ids, torch.ones(many, 1))
    assert handle[NUMBERS - 4].tolist() == [EXPERTS, 4096, 4]
    (second,) = BUFFERS.values()
    assert second is not first
    assert second.num_bytes > first.num_bytes
    assert not first.available
    assert torch.equal(elastic_combine(rows, None, handle, group())[0], torch.ones(many, HIDDEN))
    # What was sent through the smaller buffer comes back through the larger one.
    x, ids, _ = tokens_with("uneven")
    copies = torch.stack([(ids // (EXPERTS // 2) == rank).any(1) for rank in (0, 1)]).sum(0)
    back, _ = elastic_combine(old[0], None, list(old[4:]), group())
    assert torch.equal(back, (x.float() * copies[:, None]).bfloat16())
    assert torch.equal(elastic_redispatch(x, list(old[4:]), group()), old[0])
    assert list(BUFFERS.values()) == [second]
    destroy_buffers()


def order() -> None:
    """Rows come by rank and token, whatever their places; and so they do when sent again."""
    emulator.install()
    for case in CASES:
        x, ids, weights = tokens_with(case)
        first, again = send(x, ids, weights), send(x, ids, weights)
        for one, other in zip(first[:3], again[:3], strict=True):
            assert torch.equal(one, other)
        sources = first[8][:, 0]
        assert torch.equal(sources, sources.sort().values)
        assert torch.equal(elastic_redispatch(x, list(again[4:]), group()), first[0])
        assert bool((first[2][first[1] < 0] == 0).all())


def emulation() -> None:
    """It draws places at random, and stops at what the real one stops at."""
    x, ids, weights = tokens_with("uneven")
    options: dict[str, Any] = {"allow_hybrid_mode": False, "explicitly_destroy": True}
    world: Any = dist.group.WORLD
    with pytest.raises(AssertionError, match="GIN is unavailable"):
        emulator.ElasticBuffer(world, emulator.ALIGNMENT, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EP_DISABLE_GIN", "1")
        made = emulator.ElasticBuffer(
            world, num_max_tokens_per_rank=64, hidden=HIDDEN, num_topk=2, **options
        )
    rows, _, _, handle, _ = made.dispatch(x, ids, weights, num_experts=EXPERTS)
    sources = handle.recv_src_metadata[:, 0]
    assert not torch.equal(sources, sources.sort().values)
    assert handle.psum_num_recv_tokens_per_scaleup_rank[-1] == len(rows)
    assert torch.equal(made.dispatch(x, handle=handle, num_sms=4)[0], rows)
    with pytest.raises(AssertionError, match="does not know them yet"):
        made.dispatch(x, handle=handle)
    twice = torch.zeros_like(ids)
    for wrong in ((x.float(), ids), (x, twice), (x.repeat(65, 1), ids.repeat(65, 1))):
        with pytest.raises(AssertionError):
            made.dispatch(*wrong, weights, num_experts=EXPERTS)
    narrow = x[:, :64].contiguous()
    rows, _, _, handle, _ = made.dispatch(narrow, ids, weights, num_experts=EXPERTS)
    with pytest.raises(AssertionError, match="Invalid hidden"):
        made.combine(rows, handle)
    made.destroy()


@pytest.mark.parametrize(
    "check", [opcheck, opcheck_with_a_bound, padding, buffers, order, emulation]
)
def test_on_two_ranks(check: Any) -> None:
    on_ranks(2, check)

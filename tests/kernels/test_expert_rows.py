import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_compile.kernels.expert_rows import collect_rows, group_picks, spread_rows

EXPERTS = 5
ROUTINGS = st.lists(st.lists(st.integers(-1, EXPERTS - 1), min_size=3, max_size=3), max_size=9)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def picks_of(tokens: int, experts: int, picks: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, experts, (tokens, picks), generator=generator).to(device)


@given(routing=ROUTINGS)
def test_picks_are_grouped_in_order(routing: list[list[int]]) -> None:
    ids = torch.tensor(routing, dtype=torch.int64).view(-1, 3)
    order, inverse, offs = group_picks(ids, EXPERTS)
    flat = ids.flatten().tolist()
    by_expert = [[i for i, own in enumerate(flat) if own == e] for e in [*range(EXPERTS), -1]]
    assert order.tolist() == [pick for own in by_expert for pick in own]
    assert inverse[order.long()].tolist() == list(range(len(flat)))
    assert offs.diff(prepend=offs.new_zeros(1)).tolist() == [len(own) for own in by_expert[:-1]]


@given(routing=ROUTINGS)
def test_fewer_rows_than_picks(routing: list[list[int]]) -> None:
    """Where it is known how many picks are here, there are rows for no others."""
    ids = torch.tensor(routing, dtype=torch.int64).view(-1, 3)
    ids = ids[(ids >= 0).any(dim=1)]  # no other tokens travel
    weights = torch.rand(ids.numel(), 1, dtype=torch.float64)
    x = torch.randn(len(ids), 4, dtype=torch.float64)
    outs: list[list[Tensor]] = []
    for num_rows in (None, int((ids >= 0).sum())):
        grouped = group_picks(ids, EXPERTS, num_rows)
        leaf = x.clone().requires_grad_()
        rows = spread_rows(leaf, *grouped, 3)
        assert len(rows) == len(grouped[0]) == (ids.numel() if num_rows is None else num_rows)
        out = collect_rows(rows * weights[grouped[0].long()], *grouped, 3)
        outs.append([out, *torch.autograd.grad(out.sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@given(routing=ROUTINGS)
def test_a_sum_has_the_rows_of_its_token_alone(routing: list[list[int]]) -> None:
    ids = torch.tensor(routing, dtype=torch.int64).view(-1, 3)
    grouped = _, _, offs = group_picks(ids, EXPERTS)
    x = torch.randn(len(ids), 4, dtype=torch.float64)
    rows = spread_rows(x, *grouped, 3)
    rows[offs[-1] :] = torch.nan
    got = collect_rows(rows, *grouped, 3)
    torch.testing.assert_close(got, x * (ids >= 0).sum(1, keepdim=True))


def test_gradients_and_contracts() -> None:
    grouped = group_picks(torch.tensor([[0, 3], [3, 1], [2, 0]]), 4)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, *grouped, 2), (x,))
    assert torch.autograd.gradcheck(lambda rows: collect_rows(rows, *grouped, 2), (rows,))
    torch.library.opcheck(group_picks, (torch.tensor([[0, 3]]), 4))
    torch.library.opcheck(spread_rows, (x, *grouped, 2))
    torch.library.opcheck(collect_rows, (rows, *grouped, 2))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "experts", "picks", "width"),
    [(0, 4, 2, 8), (1, 1, 1, 1), (33, 4, 2, 7), (1000, 128, 8, 2048), (257, 511, 5, 2880)],
)
def test_on_a_gpu(tokens: int, experts: int, picks: int, width: int, dtype: torch.dtype) -> None:
    for ids in (picks_of(tokens, experts, picks), torch.full((tokens, picks), experts - 1)):
        here, there = group_picks(ids, experts), group_picks(ids.cuda(), experts)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
        x = torch.randn(tokens, width, dtype=dtype)
        rows, real = spread_rows(x.cuda(), *there, picks), int(there[2][-1])
        assert torch.equal(rows[:real].cpu(), spread_rows(x, *here, picks)[:real])
        few = group_picks(ids.cuda(), experts, real)
        assert torch.equal(few[0], there[0][:real])
        assert torch.equal(spread_rows(x.cuda(), *few, picks), rows[:real])
        again = collect_rows(rows[:real], *few, picks)
        rows[there[2][-1] :] = torch.nan
        assert torch.equal(again, collect_rows(rows, *there, picks))
        exact = collect_rows(rows.cpu().double(), *here, picks)
        torch.testing.assert_close(collect_rows(rows, *there, picks).cpu(), exact.to(dtype))

import builtins

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.capture.symbolic_ints import SymbolicInt, symbolic_ints


class Counting(nn.Module):
    """Experts on parts of the sorted rows, whose ends are counted with `int`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of two experts for each row of `x` [T, 8]."""
        weights, ids = self.router(x).softmax(-1).topk(2)
        order, start, results = ids.flatten().argsort(), 0, list[Tensor]()
        counts = torch.bincount(ids.flatten(), minlength=4)
        rows = x[order // 2]
        for number, expert in enumerate(self.experts):
            end = start + int(counts[number])
            results.append(expert(rows[start:end]))
            start = end
        weighed = torch.cat(results) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, weighed)


@pytest.mark.parametrize("layers", [None, 2])
def test_counts_of_rows_stay_unknown(layers: int | None) -> None:
    """In two layers, or in a model that is one block."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(Counting() for _ in range(layers))) if layers else Counting()
    x = torch.randn(12, 8)
    expected = plain(x)
    model = moe_compile.optimize(plain, example_inputs=(x,), config=OptimizeConfig(compile=False))
    sites = [s for s in moe_compile.report(model).sites if s.kind == "experts"]
    assert [site.status for site in sites] == ["rewritten"], sites
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_the_name_is_what_it_was_afterwards() -> None:
    with symbolic_ints([Counting()]):
        assert globals()["int"] is SymbolicInt
        with symbolic_ints([Counting()]):
            assert isinstance(3, int)
        assert globals()["int"] is SymbolicInt
    assert int is builtins.int


def test_known_numbers_are_plain_ones() -> None:
    assert [SymbolicInt(v) for v in ("7", 7.9, True, torch.tensor(7))] == [7, 7, 1, 7]
    assert SymbolicInt("11", 2) == 3
    assert all(type(SymbolicInt(v)) is builtins.int for v in ("7", 7.9, True, 7))
    assert isinstance(7, SymbolicInt)
    assert issubclass(bool, SymbolicInt)

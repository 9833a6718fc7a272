"""Loops over the experts that are hit: which of them run while the model is looked at."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.report import Report, Site
from tests.pairs import check_close

EXPERTS, HIDDEN = 6, 8
RUNS = Counter[int]()
"""How often the expert of each number ran."""

X = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


class Expert(nn.Module):
    def __init__(self, number: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 12), nn.Linear(12, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.number = number

    def forward(self, rows: Tensor) -> Tensor:
        RUNS[self.number] += 1
        return self.down(self.dropout(F.silu(self.up(rows))))


class Experts(nn.Module):
    """With dropout within each expert, or of what it gives."""

    def __init__(self, inner: float, outer: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(outer)
        self.experts = nn.ModuleList(Expert(i, inner) for i in range(EXPERTS))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            pick, token = torch.where(mask[hit[0]])
            rows = self.experts[int(hit[0])](x[token]) * weights[token, pick, None]
            out.index_add_(0, token, self.dropout(rows))
        return out


class Block(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(flat).softmax(-1).topk(2)
        return x + self.experts(flat, ids, weights).view(x.shape)


class NormedExperts(Experts):
    """The norm is in the code that loops."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = super().forward(x, ids, weights)
        return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)


class Model(nn.Module):
    def __init__(
        self, inner: float = 0.0, outer: float = 0.0, kind: type[Experts] = Experts
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(kind(inner, outer)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def explain(model: nn.Module) -> Report:
    RUNS.clear()
    return moe_compile.explain(model, example_inputs=(X,))


def site(report: Report, kind: str) -> Site:
    (found,) = [site for site in report.sites if site.kind == kind]
    return found


def test_all_experts_are_traced_and_few_run_elsewhere() -> None:
    with torch.device("meta"):  # nothing is verified
        model = Model()
    assert site(explain(model), "experts").status == "rewritten"
    assert 0 < RUNS[EXPERTS - 1] < RUNS[0]  # the probe, and how the forms call, take a few


@pytest.mark.parametrize(("inner", "outer"), [(0.1, 0.0), (0.0, 0.1)])
def test_experts_with_dropout_are_refused_after_a_few_of_them(inner: float, outer: float) -> None:
    found = site(explain(Model(inner, outer)), "experts")
    assert (found.layers, found.status, found.pattern) == (2, "refused", "expert_loop")
    assert found.near_miss is not None
    assert found.near_miss.reason.endswith("of an expert's rows draws random numbers")
    assert found.near_miss.remedy == "set the experts' dropout to 0"
    assert "self.dropout(" in found.near_miss.node
    assert RUNS[EXPERTS - 1] == 0


def test_what_few_experts_show_is_never_installed() -> None:
    """The norm is rewritten for evaluation alone, where there is no dropout."""
    model = Model(0.1, kind=NormedExperts)
    original = copy.deepcopy(model)
    report = moe_compile.report(moe_compile.optimize(model, example_inputs=(X,)))
    assert site(report, "rms_norm").module == "layers.0.experts"
    for training in (True, False):
        results = list[Tensor]()
        for one in (model, original):
            torch.manual_seed(0)
            results.append(one.train(training)(X))
        check_close({"out": results[0]}, {"out": results[1]})

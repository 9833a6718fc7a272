"""What is proven of a loop over experts, and what is known from an earlier proof."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.report import Site
from moe_compile.rewrite import routing_proof

EXPERTS, HIDDEN = 4, 8


class Block(nn.Module):
    """A loop over experts whose rows may go through something on their way to the sum."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 12, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 12))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, pick = torch.where(ids == e)
            rows = F.linear(F.silu(F.linear(x[token], self.up[e])), self.down[e])
            out = out.index_add(0, token, self.between(rows) * weights[token, pick, None])
        return out


class Model(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(between)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def experts_of(between: Callable[[Tensor], Tensor]) -> Site:
    """What becomes of such experts where no numbers can be compared."""
    with torch.device("meta"):
        model, x = Model(between), torch.randn(20, HIDDEN)
    report = moe_compile.explain(model, example_inputs=(x,))
    return next(site for site in report.sites if site.kind == "experts")


def test_gradients_are_proven_too() -> None:
    site = experts_of(lambda rows: rows.detach())
    assert site.status == "refused"
    assert "the gradient of input" in str(site.reason)


def test_what_runs_alike_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []

    def counted(cut: routing_proof.Cut, form: routing_proof.Form, tokens: int, _: bool) -> None:
        draws.append(tokens)
        once(cut, form, tokens, _)

    once = routing_proof._prove_once
    monkeypatch.setattr(routing_proof, "_prove_once", counted)
    monkeypatch.setattr(routing_proof, "_proven", set())
    assert experts_of(lambda rows: rows.to(torch.float64).float()).status == "rewritten"
    assert draws == [5, 2]
    assert experts_of(lambda rows: rows).status == "rewritten", "casts do nothing in a proof"
    assert draws == [5, 2]
    assert experts_of(lambda rows: rows * 2).status == "refused"

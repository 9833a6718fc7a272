"""A norm after each expert, in every loop and of every kind."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.fuzz.judge import difference, judge, measure
from moe_compile.fuzz.spec import BlockSpec
from tests.pairs import error
from tests.rewrite.normed_block import EXPERTS, HIDDEN, Block

LOOPS = ("grouped_mm", "where", "dense_output", "gather_einsum")


@pytest.mark.parametrize("norm", ["own", "shared", "torch"])
@pytest.mark.parametrize("loop", LOOPS)
def test_is_part_of_the_experts(loop: Any, norm: Any) -> None:
    spec = BlockSpec(
        seed=1,
        experts=EXPERTS,
        top_k=2,
        hidden=HIDDEN,
        width=8,
        loop=loop,
        expert_norm=norm,
        bias=True,
    )
    verdict = judge(spec)
    assert verdict.outcome == "proven", verdict.reason


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_modules_of_torch(norm: type[nn.Module]) -> None:
    model = nn.Sequential(Block(lambda: norm(HIDDEN)))
    report = moe_compile.explain(model, example_inputs=(torch.randn(2, 6, HIDDEN),))
    (site,) = [site for site in report.sites if site.kind == "experts"]
    if norm is nn.RMSNorm:
        assert site.status == "rewritten", site.reason
    else:  # of two vectors
        assert "takes part, which is no weight of the two products" in (site.reason or "")


def test_under_autocast_behind_a_norm_in_another_precision() -> None:
    """The experts then begin inside of the call of that norm, which is rewritten, too."""
    torch.manual_seed(0)
    block = Block(WideNorm, before=True)
    model = nn.Sequential(block)
    x = torch.randn(2, 6, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
    config = OptimizeConfig(compile=False, verify="full")
    moe_compile.optimize(model, config=config, example_inputs=(x,))
    kinds = {site.kind: site.status for site in moe_compile.report(model).sites}
    assert kinds["experts"] == "rewritten"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(model(x), expected) < 2e-2


class Mixed(nn.Module):
    """The first expert has other vectors than the rest, or there are `more` than experts."""

    def __init__(self, vectors: str) -> None:
        super().__init__()
        self.vectors = vectors
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8) * 0.3)
        self.first = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.rest = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.biases = nn.ParameterList(torch.randn(EXPERTS, HIDDEN) for _ in range(2))
        self.more = nn.Parameter(torch.randn(EXPERTS + 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for e in range(EXPERTS):
            token, pick = torch.where(ids == e)
            rows = F.linear(F.silu(F.linear(tokens[token], self.up[e])), self.down[e])
            if self.vectors == "biases":
                rows = rows + self.biases[int(e > 0)][e]
            elif self.vectors == "more":
                rows = rows + self.more[e + 1]
            else:
                rows = F.rms_norm(rows, (HIDDEN,), self.rest if e else self.first, 1e-6)
            out = out.index_add(0, token, rows * weights[token, pick, None])
        return out.view(x.shape)


@pytest.mark.parametrize("vectors", ["biases", "more", "norms"])
def test_vectors_from_here_and_there_are_not_mixed_up(vectors: str) -> None:
    """Also where nothing is verified."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Mixed(vectors)), torch.randn(2, 6, HIDDEN)
    expected = measure(model, x)
    config = OptimizeConfig(compile=False, verify="off")
    moe_compile.optimize(model, config=config, example_inputs=(x,))
    assert difference(expected, measure(model, x)) is None


class WideNorm(nn.Module):
    """Scales first, then normalizes in float32 (Muse Spark)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        wide = (x.float() * (1.0 + self.weight).float()).type_as(x).float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)

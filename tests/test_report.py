import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.report import Choice, NearMissReport, Report, Site
from tests.pairs import pair

KINDS = {"experts", "router", "rms_norm", "attention", "rope", "mlp", "linear", "loss"}
SITE = {"module", "layers", "kind", "pattern", "status", "reason", "provider"}
EXTRA = {"near_miss", "timings", "numerics", "tolerance", "error"}


@pytest.fixture(scope="module")
def report() -> Report:
    return moe_compile.report(pair("qwen3_moe", num_hidden_layers=2).optimized)


@pytest.fixture(scope="module")
def document(report: Report) -> dict[str, Any]:
    return report.to_json()


def test_it_is_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document)) == document


def test_it_has_the_documented_structure(document: dict[str, Any]) -> None:
    assert set(document) == {"sites", "passes", "mesh", "seconds", "captures", "not_quantized"}
    assert document["mesh"] == {}
    assert [set(site) for site in document["sites"]] == [SITE | EXTRA] * len(document["sites"])
    assert [step["name"] for step in document["passes"]] == moe_compile.PIPELINE.names()
    assert all(isinstance(value, float) for value in document["seconds"].values())
    assert {"probe", "trace", "passes", "verify", "install", "compile"} == set(document["seconds"])


def test_every_value_is_one_of_the_documented(document: dict[str, Any]) -> None:
    for site in document["sites"]:
        assert site["kind"] in KINDS
        assert site["status"] in {"rewritten", "kept", "refused"}
        assert (site["reason"] is None) == (site["status"] == "rewritten")
        assert (site["provider"] is not None) == (site["status"] == "rewritten")


def test_layers_add_up(document: dict[str, Any]) -> None:
    def layers(kind: str) -> int:
        return sum(site["layers"] for site in document["sites"] if site["kind"] == kind)

    assert layers("experts") == layers("router") == layers("mlp") == 1
    assert layers("attention") == layers("rope") == 2
    assert layers("rms_norm") == 2 * 4 + 1


def test_a_site_names_a_module_once_per_kind(document: dict[str, Any]) -> None:
    named = dict(pair("qwen3_moe", num_hidden_layers=2).optimized.named_modules())
    keys = [(site["module"], site["kind"]) for site in document["sites"]]
    assert len(set(keys)) == len(keys)
    assert all(module in named for module, _ in keys)


def test_str_is_a_table(report: Report) -> None:
    header, rule, *rows = str(report).splitlines()
    assert header.split("  ")[0] == "module"
    assert set(rule) == {"-", " "}
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    assert len(starts) == 6
    for row, site in zip(rows, report.sites, strict=False):
        cells = [row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        expected = [site.module, str(site.layers), site.kind, site.pattern or "-", site.status]
        assert cells[:5] == expected
        assert cells[5] == (site.provider if site.reason is None else site.reason)
    untimed, _ = rows[len(report.sites) :]
    assert untimed.startswith("Preferred, not timed: providers of rms_norm, experts; on a CPU")


def test_a_cell_shows_the_winner_and_by_how_much() -> None:
    first = Choice("rms_norm", "torch", "x", {"torch": 0.27, "te": 0.6, "formula": 0.618})
    later = Choice("rms_norm", "torch", "y", {"torch": 0.5, "formula": 1.0})
    other = Choice("rms_norm", "formula", "z", {"torch": 20.0, "formula": 12.346})
    site = Site("a", 1, "rms_norm", "b", "rewritten", None, "torch, formula")
    assert site.providers() == "torch, formula"
    timed = replace(site, timings=(first, later, other))
    assert timed.providers() == (
        "torch (0.27 ms; te 0.60; formula 0.62), formula (12.35 ms; torch 20.00)"
    )
    report = Report((timed,), (), 0)
    assert timed.providers() in str(report)
    (document,) = report.to_json()["sites"]
    assert document["timings"][0]["milliseconds"] == first.milliseconds
    assert document["provider"] == "torch, formula"


class OddExperts(nn.Module):
    """Routing by top-k or argmax into a mixture that no pattern knows."""

    def __init__(self, select: str) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.scales = nn.Parameter(torch.rand(4, 8) + 0.5)
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        if self.select == "max":
            weight, chosen = scores.max(-1, keepdim=True)
            return x + self.scales[chosen.squeeze(-1)] * weight
        if self.select == "argmax":
            return x + self.scales[scores.argmax(-1)]
        weights, ids = scores.topk(2)
        return x + (self.scales[ids] * weights.unsqueeze(-1)).sum(-2)


class Bank(nn.Module):
    """A loop over experts, whose results are raised to a power."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 8))
        self.down = nn.Parameter(torch.randn(4, 8, 16))
        self.power = power

    def forward(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for expert in range(4):
            token, pick = torch.where(ids == expert)
            hidden = nn.functional.silu(rows[token] @ self.up[expert].T)
            result = (hidden @ self.down[expert].T) * weights[token, pick, None]
            out = out.index_add(0, token, result**self.power)
        return out


class CubedLoop(OddExperts):
    """A loop over experts whose weights are cubed on the way out, which no mixture does."""

    def __init__(self) -> None:
        super().__init__("topk")
        self.bank = Bank(3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        return self.bank(rows, weights, ids).reshape(x.shape)


class Soft(nn.Module):
    """Every token through every expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.bank = nn.Linear(8, 4, bias=False), Bank(1)

    def forward(self, x: Tensor) -> Tensor:
        scores, ups, downs = self.gate(x).softmax(-1), self.bank.up, self.bank.down
        each = (x @ ups[e].T @ downs[e].T * scores[..., e, None] for e in range(4))
        return sum(each, torch.zeros_like(x))


def refused(block: nn.Module) -> tuple[NearMissReport, str]:
    model = nn.Sequential(block)
    report = moe_compile.explain(model, example_inputs=(torch.randn(2, 5, 8),))
    (site,) = (site for site in report.sites if site.kind == "experts")
    assert site.status == "refused"
    assert site.near_miss is not None
    return site.near_miss, str(report)


def test_a_refusal_shows_the_near_miss_in_five_lines() -> None:
    near, text = refused(CubedLoop())
    lines = near.lines("0", 1)
    assert len(lines) == 5
    assert "\n".join(lines) in text
    assert near.pattern == "expert_loop"
    assert "not proven" in near.progress
    assert near.remedy.startswith("spell it as `before` in moe_compile/patterns/expert_loop.py")


def test_a_refusal_names_the_line_of_the_source() -> None:
    near, _ = refused(CubedLoop())
    assert "test_report.py:" in near.node
    assert near.node.endswith("out = out.index_add(0, token, result**self.power)")


class NeedsSize(OddExperts):
    """Code of its own that cannot be captured, around a child that can."""

    def __init__(self) -> None:
        super().__init__("topk")
        self.up = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 8)
        picked = self.gate(tokens).argmax(-1)
        rows = torch.tensor([*range(tokens.shape[0])])
        return (self.up[picked] @ tokens[rows, :, None])[..., 0].reshape(x.shape)


def test_a_block_that_cannot_be_captured_is_refused_though_its_children_can() -> None:
    report = moe_compile.explain(nn.Sequential(NeedsSize()), example_inputs=(torch.randn(2, 5, 8),))
    (site,) = (site for site in report.sites if site.kind == "experts")
    assert (site.module, site.status) == ("0", "refused")
    assert site.reason is not None
    assert site.reason.endswith("in forward: rows = torch.tensor([*range(tokens.shape[0])]))")


class Banks(nn.Module):
    """Two banks of experts behind one router, of which one is no mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.banks = nn.ModuleDict({"plain": Bank(1), "cubed": Bank(3)})

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.reshape(-1, 8)).softmax(-1).topk(2)
        rows = x.reshape(-1, 8)
        return sum(bank(rows, weights, ids) for bank in self.banks.values()).reshape(x.shape)  # type: ignore[union-attr]


def test_experts_beside_rewritten_ones_are_told_of() -> None:
    report = moe_compile.explain(nn.Sequential(Banks()), example_inputs=(torch.randn(2, 5, 8),))
    found = {site.module: site.status for site in report.sites if site.kind == "experts"}
    assert found == {"0.banks.plain": "rewritten", "0.banks.cubed": "refused"}


def test_experts_without_a_known_selection_are_told_of() -> None:
    near, _ = refused(Soft())
    assert near.pattern == "expert_loop"
    assert near.reason == "the experts' results are never put together"


def test_where_no_pattern_is_near_the_selection_is_named() -> None:
    near, _ = refused(OddExperts("topk"))
    assert near.pattern is None
    assert near.node.endswith("weights, ids = scores.topk(2)")
    assert "docs/new_architecture.md" in near.remedy


@pytest.mark.parametrize("select", ["topk", "argmax", "max"])
def test_routing_into_unknown_experts_is_a_refused_site(select: str) -> None:
    model = nn.Sequential(nn.ModuleList([OddExperts(select)])[0])
    x = torch.randn(2, 5, 8)
    expected = model(x)
    report = moe_compile.report(moe_compile.optimize(model, example_inputs=(x,)))
    found = [site for site in report.sites if site.kind == "experts"]
    assert [(site.module, site.layers, site.status) for site in found] == [("0", 1, "refused")]
    assert found[0].reason
    assert found[0].reason in str(report)
    assert torch.equal(model(x), expected)


class Block(nn.Module):
    """One function of a sequence, as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.weight


def odd_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def nearly_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)


def fused_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (8,))


def sharpened(x: Tensor) -> Tensor:
    weights = (x @ x.mT).softmax(-1)
    return (weights * weights) @ x


def sparse(x: Tensor) -> Tensor:
    scores = x @ x.mT
    return scores.scatter(-1, scores.topk(2).indices, 1.0) @ x


@pytest.mark.parametrize(
    ("function", "kind", "status", "reason"),
    [
        (odd_norm, "rms_norm", "refused", "no known spelling"),
        (nearly_norm, "rms_norm", "refused", r"8 of 8 operations fit; at .*"),
        (fused_norm, "rms_norm", "kept", "it is torch's own kernel"),
        (sharpened, "attention", "refused", ".*"),
        (sparse, "attention", "refused", "it selects positions"),
    ],
)
def test_norms_and_attention_without_a_match(
    function: Callable[[Tensor], Tensor], kind: str, status: str, reason: str
) -> None:
    model = nn.Sequential(nn.ModuleList([Block(function)])[0])
    (site,) = moe_compile.explain(model, example_inputs=(torch.randn(2, 5, 8),)).sites
    assert (site.module, site.layers, site.kind, site.status) == ("0", 1, kind, status)
    assert re.fullmatch(reason, str(site.reason))

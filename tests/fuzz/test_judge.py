"""The judge finds what is planted."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import moe_compile
from moe_compile.fuzz.draw import select
from moe_compile.fuzz.judge import FAILURES, Verdict, difference, judge, judge_seed
from moe_compile.fuzz.spec import BlockSpec, LookAlike
from moe_compile.ops.experts import experts
from moe_compile.patterns import GroupedExperts
from moe_compile.report import Report

GROUPED = BlockSpec(seed=0, experts=4, top_k=2, hidden=8, width=8)
LOOK_ALIKE = BlockSpec(seed=0, experts=4, top_k=2, hidden=8, width=8, look_alike="mean_subtracted")


def plant(monkeypatch: pytest.MonkeyPatch, after: Any) -> None:
    monkeypatch.setattr(GroupedExperts, "after", staticmethod(after))


def without_weights(*, weights: Tensor, sentinels: bool, **others: Any) -> Tensor:
    return experts(weights=torch.ops.aten.ones_like.default(weights), **others)


def detached(*, weights: Tensor, sentinels: bool, **others: Any) -> Tensor:
    return experts(weights=torch.ops.aten.detach.default(weights), **others)


def test_a_grouped_block_is_proven() -> None:
    verdict = judge(GROUPED)
    assert (verdict.outcome, verdict.reason) == ("proven", "")
    assert verdict.steps["trace"] > 0


def test_a_look_alike_is_refused() -> None:
    verdict = judge(LOOK_ALIKE)
    assert verdict.outcome == "refused"
    assert "may mix tokens" in verdict.reason


@pytest.mark.parametrize(
    ("after", "named"), [(without_weights, "output 0"), (detached, "gradient of")]
)
def test_a_wrong_rewrite_is_found(monkeypatch: pytest.MonkeyPatch, after: Any, named: str) -> None:
    plant(monkeypatch, after)
    wrong = judge(GROUPED, verify="off")
    assert wrong.outcome == "wrong"
    assert named in wrong.reason
    refused = judge(GROUPED)
    assert refused.outcome == "refused"
    assert "verification failed" in refused.reason


def test_where_all_is_zero_nothing_differs() -> None:
    nothing = {"output 0": torch.zeros(2)}
    assert difference(nothing, nothing) is None
    assert difference(nothing, {"output 0": torch.ones(2)}) is not None


def test_a_missing_site_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_compile, "report", lambda model: Report((), (), 0))
    verdict = judge(GROUPED)
    assert verdict.outcome == "silent"


def test_an_unused_rewrite_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def then_forget(model: Any) -> Report:
        """The report; from now on every call is of a form that was not captured."""
        found = report(model)
        monkeypatch.setattr("moe_compile.install.forward.Variant.inputs", lambda *_: None)
        return found

    report = moe_compile.report
    monkeypatch.setattr(moe_compile, "report", then_forget)
    verdict = judge(GROUPED)
    assert verdict.outcome == "silent"
    assert "runs its own code" in verdict.reason


def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(moe_compile, "optimize", crash)
    verdict = judge(GROUPED)
    assert verdict.outcome == "crashed"
    assert "planted" in verdict.reason


def test_differences() -> None:
    ones = {"a": torch.ones(4), "tiny": torch.full((4,), 1e-9)}
    assert difference(ones, ones) is None
    assert difference(ones, {"a": torch.ones(4), "tiny": torch.zeros(4)}) is None
    assert "a is off by 1.0e-03" in str(difference(ones, {**ones, "a": torch.full((4,), 1.001)}))
    assert "nan" in str(difference(ones, {**ones, "a": torch.full((4,), torch.nan)}))
    assert "shape (3,)" in str(difference(ones, {**ones, "a": torch.ones(3)}))
    assert "instead of" in str(difference(ones, {"a": torch.ones(4)}))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [kind for kind in get_args(LookAlike) if kind != "none"])
def test_every_look_alike_is_refused_or_right(kind: str) -> None:
    check([judge_seed(seed) for seed in select(0, 2, {"look_alike": kind})])


def check(verdicts: list[Verdict]) -> None:
    assert [v for v in verdicts if v.outcome in FAILURES] == []


def test_random_blocks() -> None:
    check([judge_seed(seed) for seed in range(15)])

"""Counting, the command line, and the whole campaign."""

import dataclasses

import pytest

from moe_compile.cli import main
from moe_compile.fuzz.campaign import Tally, describe, verdicts
from moe_compile.fuzz.judge import FAILURES, Outcome, Verdict
from moe_compile.fuzz.spec import BlockSpec

SPEC = BlockSpec(seed=5, experts=4, top_k=2, hidden=8, width=8, loop="where")


def tally(*outcomes: Outcome) -> Tally:
    result = Tally()
    for outcome in outcomes:
        reason = "" if outcome == "proven" else "5 of 7 operations fit"
        result.add(Verdict(SPEC, outcome, reason, 0.5, {"trace": 0.25}))
    return result


def test_shares_are_of_supported_blocks() -> None:
    counted = tally("proven", "proven", "proven", "refused")
    look_alike = dataclasses.replace(SPEC, look_alike="product")
    counted.add(Verdict(look_alike, "refused", "no", 0.5))
    assert counted.proven_share == 75.0
    assert counted.failures == []
    assert Tally().proven_share == 100.0


def test_the_table() -> None:
    table = tally("proven", "refused", "refused").table()
    assert "proven of the supported: 33.3 %" in table
    assert "     2  # of # operations fit" in table
    assert "seconds a block: 0.50 (trace 0.25, comparison 0.25)" in table
    assert "where               1 of     3 proven" in table


def test_failures_are_described() -> None:
    counted = tally("proven", "wrong", "silent", "crashed")
    assert [v.outcome for v in counted.failures] == list(FAILURES)
    text = describe(counted.failures[0])
    assert "moe-compile fuzz --block 5" in text
    assert "loop=where" in text
    assert "class MoEBlock(nn.Module):" in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--blocks", "2", "--seed", "12", "--share", "0"]) == 0
    out, err = capsys.readouterr()
    assert "2 blocks in" in out
    assert "2 of 2: " in err


def test_the_command_wants_its_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = tally("proven", "refused").verdicts
    monkeypatch.setattr("moe_compile.fuzz.campaign.judge_seed", lambda seed: judged[seed % 2])
    assert main(["fuzz", "--blocks", "2"]) == 1
    assert main(["fuzz", "--blocks", "2", "--share", "50"]) == 0
    assert "proven of the supported: 50.0 %" in capsys.readouterr().out


def test_the_command_fails_on_failures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = tally("wrong").verdicts[0]
    monkeypatch.setattr("moe_compile.fuzz.campaign.judge_seed", lambda seed: judged)
    monkeypatch.setattr("moe_compile.fuzz.judge.judge_seed", lambda seed: judged)
    assert main(["fuzz", "--blocks", "1", "--share", "0"]) == 1
    assert "wrong: block 5" in capsys.readouterr().out
    assert main(["fuzz", "--block", "5"]) == 1
    assert "class MoEBlock" in capsys.readouterr().out


def test_processes_agree() -> None:
    found = list(verdicts([12, 5], jobs=2))
    assert [v.spec.seed for v in found] == [12, 5]
    assert [v.outcome for v in found] == [v.outcome for v in verdicts([12, 5])]

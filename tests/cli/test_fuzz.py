"""The command: what it prints, and its status."""

import subprocess
import sys

import pytest

from moe_compile.cli import main
from moe_compile.fuzz.draw import draw
from moe_compile.fuzz.judge import Verdict
from tests.fuzz.verdicts import tally


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


def test_the_command_selects(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = tally("proven").verdicts[0]
    seeds: list[int] = []

    def judge_seed(seed: int) -> Verdict:
        seeds.append(seed)
        return judged

    monkeypatch.setattr("moe_compile.fuzz.campaign.judge_seed", judge_seed)
    assert main(["fuzz", "--blocks", "2", "--only", "loop=where", "--only", "top_k=3"]) == 0
    assert [(draw(seed).loop, draw(seed).top_k) for seed in seeds] == [("where", 3)] * 2
    assert main(["fuzz", "--only", "colour=red"]) == 2
    assert "--only got 'colour'" in capsys.readouterr().err


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "moe_compile", "fuzz", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: moe-compile fuzz" in found.stdout

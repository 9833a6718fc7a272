"""The examples and the README run as they stand, and the README shows what they print."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAST = ["--steps", "2", "--batch", "2", "--length", "32"]

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """What `python *command` prints; fails with what it complained of."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def without_times(printed: str) -> list[str]:
    return [line.partition(";")[0] for line in printed.strip().splitlines()]


@pytest.mark.matrix
def test_pass_order() -> None:
    refusals, table = run("examples/pass_order.py").split("\n\n")
    assert "needs the fact 'planned'" in refusals
    assert "needs the fact 'lowered', which 'raise_norms' broke" in refusals
    sites = {line[:28].strip(): int(line[28:].split()[0]) for line in table.splitlines()[1:]}
    assert sites["as it was"] == 0
    assert sites["norms dropped"] < sites["default"] == sites["experts last"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_finetune(tmp_path: Path, ranks: int) -> None:
    """As `make demo RANKS=1` and `make demo` run it."""
    script = ROOT / "examples" / "finetune.py"
    runpy.run_path(str(script))["write_small_model"](tmp_path / "model", README)
    folders = ["--model", tmp_path / "model", "--save", tmp_path / "saved"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher = torchrun if ranks > 1 else []
    printed = run(*launcher, script, *folders, "--text", ROOT / "README.md", *FAST)
    assert "grouped_experts" in printed
    assert ("all_to_all, torch" in printed) == (ranks > 1)
    assert "logits in plain transformers" in printed
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_readme_prints_what_it_shows() -> None:
    (code,) = blocks("python")
    (shown,) = blocks("text")
    assert without_times(run("-c", code)) == without_times(shown)

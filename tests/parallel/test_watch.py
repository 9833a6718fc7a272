"""A job ends soon after one of its ranks, and says which it was and where."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.failing_job import TIMEOUT

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.1"
SAID = {
    "kill": "rank 1 was in the {place} of model.layers.1",
    "raise": "rank 1 failed in the {place} of model.layers.1: ZeroDivisionError",
    "hang": "rank 1 was in the {place} of model.layers.1, which it entered",
}


def run_job(way: str, place: str, folder: Path) -> None:
    folder.mkdir()
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*job, "tests/parallel/failing_job.py", way, place, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    seconds = time.time() - float((folder / "time").read_text())
    print(f"{way} in the {place}: {seconds:.1f} s")
    assert ended.returncode != 0
    assert SAID[way].format(place=place) in ended.stderr, ended.stderr
    assert seconds < (TIMEOUT + 5 if way == "hang" else 5), ended.stderr
    for note in folder.glob("pid-*"):
        assert not Path("/proc", note.read_text()).exists()


@pytest.mark.parametrize(
    ("way", "place"), [("kill", "forward"), ("raise", "backward"), ("hang", "forward")]
)
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.matrix)])
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_job_ends_with_one_of_its_ranks(tmp_path: Path, way: str, place: str, times: int) -> None:
    for number in range(times):
        other = "backward" if place == "forward" else "forward"
        run_job(way, place if number % 2 == 0 else other, tmp_path / str(number))

"""A job ends soon after one of its ranks, and says which it was and where."""

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.parallel import watch
from tests.families import build
from tests.pairs import COMPILED, inputs, step
from tests.parallel.failing_job import TIMEOUT
from tests.parallel.models import EXPERTS_ONLY, no_graph_breaks

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.1"
SAID = {
    "kill": "rank 1 was in the {place} of model.layers.1",
    "raise": "rank 1 failed in the {place} of model.layers.1: ZeroDivisionError",
    "hang": "rank 1 was in the {place} of model.layers.1, which it entered",
}


def run_job(way: str, place: str, folder: Path) -> None:
    folder.mkdir()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*job, "tests/parallel/failing_job.py", way, place, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (folder / "time").exists(), ended.stderr
    seconds = time.time() - float((folder / "time").read_text())
    print(f"{way} in the {place}: {seconds:.1f} s, slowness {slowness():.1f}", flush=True)
    assert ended.returncode != 0
    assert SAID[way].format(place=place) in ended.stderr, ended.stderr
    assert seconds < 5 * slowness() + (TIMEOUT if way == "hang" else 0), ended.stderr
    ranks = {note.read_text() for note in folder.glob("pid-*")}
    assert len(ranks) == 2
    assert running(ranks) == []


def running(ranks: set[str]) -> list[str]:
    """What is left of ranks and of what they started: torchrun gives each rank a session."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            line = (process / "stat").read_text()
            state, _, _, session = line.rpartition(")")[2].split()[:4]
            found += [line] if state != "Z" and session in ranks else []
    return found


def slowness() -> float:
    """How many processes there are for a core: a machine that does other things takes longer."""
    return max(1, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.parametrize(
    ("way", "place", "times"),
    [
        ("kill", "forward", 1),
        pytest.param("raise", "backward", 1, marks=pytest.mark.matrix),
        pytest.param("hang", "forward", 1, marks=pytest.mark.matrix),
        pytest.param("kill", "forward", 20, marks=pytest.mark.long),
        pytest.param("raise", "backward", 20, marks=pytest.mark.long),
        pytest.param("hang", "forward", 20, marks=pytest.mark.long),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_job_ends_with_one_of_its_ranks(tmp_path: Path, way: str, place: str, times: int) -> None:
    for number in range(times):
        other = "backward" if place == "forward" else "forward"
        run_job(way, place if number % 2 == 0 else other, tmp_path / str(number))


def test_hooks_change_nothing_and_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    class Note:
        def enter(self, place: str) -> None:
            entered.append(place)

    monkeypatch.setattr(watch, "_note_of_this_process", Note)
    model: Any = build("mixtral")
    plain = copy.deepcopy(model)
    watch.watch(model, ["model.layers.0", "model.layers.1"])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    expected = step(plain, **inputs())
    for each in (model, copied):
        entered.clear()
        found = step(each, **inputs())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert entered == [
            "the forward of model.layers.0",
            "the forward of model.layers.1",
            "the backward of model.layers.1",
            "the backward of model.layers.0",
        ]
    compiled = torch.compile(copied, backend="eager", fullgraph=True)
    entered.clear()
    assert torch.equal(compiled(**inputs()).loss, expected["loss"])
    assert entered == []


def test_compiled_layers_are_noted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    class Note:
        def enter(self, place: str) -> None:
            entered.append(place)

    monkeypatch.setattr(watch, "_note_of_this_process", Note)
    config = OptimizeConfig(compile=COMPILED.compile, verify="off", autocast=False)
    model = moe_compile.optimize(build("mixtral"), config=config, passes=EXPERTS_ONLY)
    watch.watch(model, [LAYER])
    with no_graph_breaks():
        step(model, **inputs())
    assert entered == [f"the forward of {LAYER}", f"the backward of {LAYER}"]


def test_what_a_rank_says(tmp_path: Path) -> None:
    files = [tmp_path / str(rank) / "error.json" for rank in range(3)]
    for file in files:
        file.parent.mkdir()
    notes = [watch._Note(rank, str(file)) for rank, file in enumerate(files)]
    for note in notes:
        note.enter("the forward of model.layers.7")
    failures = [ProcessFailure(rank, 1, -9, str(file)) for rank, file in enumerate(files)]
    assert failures[1].message["message"] == "rank 1 was in the forward of model.layers.7"  # type: ignore[index]
    assert abs(failures[1].timestamp - time.time()) < 100
    said = notes[1].fail(ValueError('of "two"\nlines'))
    assert said == (
        "rank 1 failed in the forward of model.layers.7: ValueError('of \"two\"\\nlines')"
    )
    assert ProcessFailure(1, 1, 1, str(files[1])).message["message"] == said  # type: ignore[index]
    files[2].write_text(json.dumps({"message": {"extraInfo": {"py_callstack": "..."}}}))
    (other,) = notes[1].others()
    assert other.startswith("rank 0 was in the forward of model.layers.7, which it entered 0.")
    notes[2].fail(ValueError())  # torch's `record` knows more
    assert "py_callstack" in files[2].read_text()
    assert watch._Note(0, None).fail(ValueError()).startswith("rank 0 failed in what comes before")

"""The folders of steps: whole, or not to be seen."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_compile.checkpoint import steps
from moe_compile.checkpoint.steps import StepFolder, clear_leftovers, complete_steps


def write(place: StepFolder, value: str) -> None:
    place.unfinished.mkdir(parents=True)
    (place.unfinished / "state").write_text(value)


def test_what_is_not_whole_is_not_seen(tmp_path: Path) -> None:
    assert complete_steps(tmp_path / "nothing") == []
    place = StepFolder(tmp_path, 12)
    write(place, "x")
    write(StepFolder(tmp_path, 3), "y")
    (tmp_path / "step-x").mkdir()
    assert complete_steps(tmp_path) == []
    place.publish()
    assert complete_steps(tmp_path) == [12]
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-12", "step-x"]


class Stopped(BaseException):
    """As a kill: nothing is done about it."""


@pytest.mark.parametrize("moment", range(6))
def test_a_step_that_is_saved_again_is_there_all_the_time(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = StepFolder(tmp_path, 7)
    write(place, "older")
    place.publish()
    write(place, "newer")
    left = [moment]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return function(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(steps.shutil, "rmtree", counted(shutil.rmtree))
        if moment < 4:
            with pytest.raises(Stopped):
                place.publish()
        else:
            place.publish()
    assert complete_steps(tmp_path) == [7]
    assert (place.complete / "state").read_text() == ("older" if moment < 2 else "newer")
    clear_leftovers(tmp_path)
    assert (place.complete / "state").read_text() == ("older" if moment < 2 else "newer")
    write(place, "newest")
    place.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]
    assert (place.complete / "state").read_text() == "newest"

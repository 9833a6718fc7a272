"""A checkpoint takes another one's place: whenever it is stopped, the folder loads one of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_compile.checkpoint import publish
from moe_compile.checkpoint.publish import beside, index_name, make_beside, weights_name

Names = dict[str, str]


def write(folder: Path, parts: int, value: str) -> None:
    """Writes beside, as a save does: one file, or several and an index; each holds the value."""
    written = make_beside(folder)
    (written / "config.json").write_text(value)
    names = [weights_name(None, f"-{i:05d}-of-{parts:05d}") for i in range(1, parts + 1)]
    for name in names if parts > 1 else [weights_name(None)]:
        (written / name).write_text(value)
    if parts > 1:
        index = {"weight_map": {f"weight{i}": name for i, name in enumerate(names)}}
        (written / index_name(None)).write_text(json.dumps(index))


def loaded(folder: Path) -> set[str]:
    """What transformers would read: the single file, or else those of the index."""
    single = folder / weights_name(None)
    if single.exists():
        return {single.read_text()}
    places = json.loads((folder / index_name(None)).read_text())["weight_map"]
    return {(folder / name).read_text() for name in places.values()}


class Stopped(BaseException):
    """As a kill: nothing is done about it."""


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Stops before the step of a number that changes the folder."""
    left = [steps]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return function(*args, **kwargs)

        return step

    patch.setattr(publish.os, "replace", counted(publish.os.replace))
    patch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize(
    ("old", "new"), [(1, 1), (1, 3), (3, 1), (3, 3), (3, 2), (2, 3)], ids=lambda n: f"{n}"
)
def test_stopped_anywhere(tmp_path: Path, old: int, new: int) -> None:
    found: list[str] = []
    for steps in range(20):
        folder = tmp_path / str(steps)
        write(folder, old, "older")
        publish.publish(folder, None)
        (folder / "notes.txt").write_text("a user's own")
        write(folder, new, "newer")
        with pytest.MonkeyPatch.context() as patch:
            stop_after(steps, patch)
            try:
                publish.publish(folder, None)
                break
            except Stopped:
                (value,) = loaded(folder)
                found.append(value)
        check_next_save(folder, new)
    assert found == sorted(found, reverse=True)  # never back to the older one
    assert found[0] == "older"
    check_clean(tmp_path / str(len(found)), new)


def check_next_save(folder: Path, parts: int) -> None:
    """What was stopped is in nobody's way."""
    write(folder, parts, "next")
    publish.publish(folder, None)
    assert loaded(folder) == {"next"}
    check_clean(folder, parts)


def check_clean(folder: Path, parts: int) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 + (1 if parts == 1 else parts + 1), names
    assert "notes.txt" in names
    assert not beside(folder).exists()


def test_parts_have_their_usual_names_when_they_can(tmp_path: Path) -> None:
    names: list[list[str]] = []
    for _ in range(3):
        write(tmp_path, 2, "x")
        publish.publish(tmp_path, None)
        names.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
    usual = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    again = [name.replace("model-", "model-again-") for name in usual]
    assert names == [usual, again, usual]


def test_a_broken_index_and_folders_inside(tmp_path: Path) -> None:
    (tmp_path / index_name(None)).write_text('{"weight_ma')
    write(tmp_path, 2, "x")
    (beside(tmp_path) / "second").mkdir()
    (beside(tmp_path) / "second" / "adapter_model.safetensors").write_text("y")
    publish.publish(tmp_path, None)
    assert loaded(tmp_path) == {"x"}
    assert (tmp_path / "second" / "adapter_model.safetensors").read_text() == "y"
    shutil.rmtree(tmp_path / "second")

"""Puts a checkpoint in the place of another one: at any moment the folder loads one of them.

It is written into a folder inside, down to the disk, and then renamed, file by file. Transformers
reads a single file of weights before it looks for an index, and of the rest what the index names.
So one rename decides: that of the single file, that of the index, or the end of an older single
file. Files that the older index names keep their names until then.

What is no tensor comes first: where two checkpoints differ there, as those of other models do, a
save that is killed between these renames leaves the newer config with the older weights.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from moe_compile.checkpoint.steps import sync_folder

_PART = r"(-again)?-\d{5}-of-\d{5}\.safetensors"


def weights_name(variant: str | None, suffix: str = "") -> str:
    """The name of a file of weights; a suffix tells which part it is."""
    return f"model{_dotted(variant)}{suffix}.safetensors"


def index_name(variant: str | None) -> str:
    """The name of the file that says which part holds which tensor."""
    return f"model.safetensors.index{_dotted(variant)}.json"


def _dotted(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"


def beside(folder: Path) -> Path:
    """Where a checkpoint is written before it is in its place."""
    return folder / ".unfinished"


def make_beside(folder: Path) -> Path:
    """An empty one; what a killed save left behind is removed."""
    shutil.rmtree(beside(folder), ignore_errors=True)
    beside(folder).mkdir(parents=True)
    return beside(folder)


def publish(folder: Path, variant: str | None) -> None:
    """Puts what was written beside in its place, and removes what it replaces."""
    written = beside(folder)
    index, single = index_name(variant), weights_name(variant)
    parts = _parts(written / index)
    if parts & _in_use(folder, index, single):
        parts = _rename_parts(written / index)
    _sync_files(written)
    last = [name for name in (*sorted(parts), index, single) if (written / name).exists()]
    others = sorted(str(p.relative_to(written)) for p in written.rglob("*") if p.is_file())
    for name in dict.fromkeys((*(n for n in others if n not in last), *last)):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(written / name, folder / name)
    if last:
        _remove_older(folder, variant, parts)
    sync_folder(folder)
    shutil.rmtree(written)


def _parts(index: Path) -> set[str]:
    """The files that an index names."""
    try:
        found: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # one that was cut off loads nothing
        return set()
    return set(found["weight_map"].values())


def _in_use(folder: Path, index: str, single: str) -> set[str]:
    """The parts that are read now."""
    return set() if (folder / single).exists() else _parts(folder / index)


def _rename_parts(index: Path) -> set[str]:
    """Gives the parts that were written the names that the last save did not use."""
    text = index.read_text(encoding="utf-8")
    for old in _parts(index):
        new = re.sub(r"-(\d{5}-of-)", r"-again-\1", old)
        (index.parent / old).rename(index.parent / new)
        text = text.replace(f'"{old}"', f'"{new}"')
    index.write_text(text, encoding="utf-8")
    return _parts(index)


def _remove_older(folder: Path, variant: str | None, parts: set[str]) -> None:
    """The last step of all where there are parts: a single file is read before an index is."""
    (folder / (weights_name(variant) if parts else index_name(variant))).unlink(missing_ok=True)
    older = re.compile(re.escape(f"model{_dotted(variant)}") + _PART)
    for path in folder.iterdir():
        if older.fullmatch(path.name) and path.name not in parts:
            path.unlink()


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)


def sync_file(path: Path) -> None:
    """Makes a file's contents survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())

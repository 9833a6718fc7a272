"""The folders of a run's states: a step's folder is there as a whole, or not at all.

What is being written is called `.step-N.unfinished`, and renamed when every byte of it is on the
disk. A step that is saved again is called `.step-N.replaced` until the new one is in its place.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

_COMPLETE = re.compile(r"step-(\d+)|\.step-(\d+)\.replaced")


@dataclass(frozen=True)
class StepFolder:
    """Where the state after one step is, will be, and was."""

    root: Path
    step: int

    @property
    def final(self) -> Path:
        """The whole state."""
        return self.root / f"step-{self.step}"

    @property
    def unfinished(self) -> Path:
        """What is being written, or thrown away."""
        return self.root / f".step-{self.step}.unfinished"

    @property
    def replaced(self) -> Path:
        """The whole state that was saved before, while there is no other."""
        return self.root / f".step-{self.step}.replaced"

    def publish(self) -> None:
        """Turns what was written into the step's state."""
        sync_folder(self.unfinished)
        if self.final.exists():
            self.final.rename(self.replaced)
        self.unfinished.rename(self.final)
        sync_folder(self.root)
        self._discard_replaced()

    def _discard_replaced(self) -> None:
        """Under another name, as it is no whole state any more once a file is gone."""
        if self.replaced.exists() and self.final.exists():
            self.replaced.rename(self.unfinished)
            shutil.rmtree(self.unfinished)

    @property
    def complete(self) -> Path:
        """The whole state, wherever a killed save has left it."""
        return self.final if self.final.exists() else self.replaced


def complete_steps(root: Path) -> list[int]:
    """The steps whose states are whole, in order."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    found = [match for match in map(_COMPLETE.fullmatch, names) if match]
    return sorted({int(match[1] or match[2]) for match in found})


def clear_leftovers(root: Path) -> None:
    """Removes what killed saves left behind; nobody else may be saving there."""
    root.mkdir(parents=True, exist_ok=True)
    for step in complete_steps(root):
        StepFolder(root, step)._discard_replaced()
    for path in root.glob(".step-*.unfinished"):
        shutil.rmtree(path)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

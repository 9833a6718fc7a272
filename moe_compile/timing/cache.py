"""What was timed before, in a small JSON file that all programs of a user share."""

import json
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)

Record = dict[str, float | str]
"""By provider: milliseconds, or why it could not be timed."""


def default_path() -> Path:
    """`timings.json` in MOE_COMPILE_CACHE, or else in the user's folder for caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache").expanduser()
    folder = os.environ.get("MOE_COMPILE_CACHE") or Path(home, "moe_compile")
    return Path(folder, "timings.json")


@dataclass(frozen=True)
class TimingCache:
    """Records by what they hold for: the device, versions, op and arguments as one text."""

    path: Path = field(default_factory=default_path)

    def read(self, key: str) -> Record | None:
        """The record for a key; None if there is none."""
        return self._all().get(key)

    def add(self, key: str, record: Record) -> None:
        """Writes one more record: others may read the file at any time, and see it whole."""
        records = self._all() | {key: record}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(records, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            _LOG.warning("timings are not kept: %s; set MOE_COMPILE_CACHE to a folder", error)

    def _all(self) -> dict[str, Record]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError:
            return {}
        except ValueError as error:  # also what is not UTF-8
            return self._spoilt(str(error))
        return found if _is_sound(found) else self._spoilt("it holds something else")

    def _spoilt(self, why: str) -> dict[str, Record]:
        _LOG.warning("the timings in %s cannot be read and are made anew: %s", self.path, why)
        return {}


def _is_sound(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    records: list[Any] = list(found.values())
    return all(
        isinstance(record, dict) and all(isinstance(v, (float, str)) for v in record.values())
        for record in records
    )

"""A bar on a terminal while candidates are timed, if that takes more than a second."""

import sys
from typing import Any

DELAY = 1.0
"""Seconds without a bar."""


class Progress:
    """Counts candidates; nobody knows how many there will be."""

    def __init__(self) -> None:
        self._bar: Any = None

    def tell(self, what: str) -> None:
        """Shows what is being timed now."""
        if self._bar is None:
            self._bar = _bar()
        self._bar.set_description(f"timing {what}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar() -> Any:
    from tqdm import tqdm  # transformers needs it, so it is there

    hidden = not sys.stderr.isatty()
    return tqdm(delay=DELAY, disable=hidden, leave=False, mininterval=0, unit=" candidates")

"""A bar on a terminal while candidates are timed, if that takes more than a second."""

import sys
from typing import Any


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

    return tqdm(delay=1.0, disable=not sys.stderr.isatty(), leave=False, unit=" candidates")

"""The one way in which a pattern, a provider or the installer says no."""

from typing import Any


class Refuse(Exception):
    """A pattern, provider or installer declines, with a reason for the report.

    Attributes:
        reason: one sentence that a model's author can act on.
        node: the graph node that did not fit, where there is one.
        remedy: what would make it match, where that is more than another pattern.
        depth: how many nodes had fitted before it, where they are counted.
    """

    depth: int = 0

    def __init__(self, reason: str, node: Any = None, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.remedy = remedy

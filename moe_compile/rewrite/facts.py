"""Facts: what a pass may rely on, and what it establishes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class Fact:
    """Something that holds of a graph. `holds` checks it, after the pass that gives it."""

    name: str
    holds: Callable[[fx.Graph], bool] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.name

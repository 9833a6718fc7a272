"""Passes and their order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moe_compile.rewrite.facts import Fact
from moe_compile.rewrite.unit_graph import UnitGraph


@dataclass(frozen=True)
class Pass:
    """A step on one unit's graph: a frozen dataclass whose fields are its options.

    Attributes:
        name: a verb, as in `raise_norms`.
        needs: the facts that must hold before it.
        gives: the facts that hold after it.
        breaks: the facts that may no longer hold after it.
        exact: False for a pass that changes numerics on purpose.
        tolerance: of such a pass, how far an output or gradient of a module may then be from the
            exact one, in L2 norm beside its own.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0

    def run(self, unit: UnitGraph) -> int:
        """Changes the unit's graph or plan; returns how many things it changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pipeline:
    """An immutable order of passes in which every pass finds the facts that it needs.

    Raises:
        ValueError: at construction, naming the pass and the missing fact.
    """

    passes: tuple[Pass, ...]
    needs_at_end: frozenset[Fact] = frozenset()

    def __post_init__(self) -> None:
        names = [step.name for step in self.passes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the pipeline has {name!r} twice; give each pass its own name")
        known: dict[Fact, str | None] = {}
        for step in self.passes:
            _require(known, step.needs, f"pass {step.name!r}", self)
            known.update({fact: step.name for fact in step.breaks if fact in known})
            known.update(dict.fromkeys(step.gives))
        _require(known, self.needs_at_end, "installing the result", self)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def names(self) -> list[str]:
        """The passes' names, in order."""
        return [step.name for step in self.passes]

    def without(self, *names: str) -> "Pipeline":
        """The same order with the named passes left out."""
        for name in names:
            self._index(name)
        return self._with(tuple(step for step in self.passes if step.name not in names))

    def before(self, name: str, *new: Pass) -> "Pipeline":
        """The same order with `new` passes before the named one."""
        at = self._index(name)
        return self._with((*self.passes[:at], *new, *self.passes[at:]))

    def after(self, name: str, *new: Pass) -> "Pipeline":
        """The same order with `new` passes after the named one."""
        at = self._index(name) + 1
        return self._with((*self.passes[:at], *new, *self.passes[at:]))

    def replace(self, name: str, new: Pass) -> "Pipeline":
        """The same order with `new` in the place of the named pass."""
        at = self._index(name)
        return self._with((*self.passes[:at], new, *self.passes[at + 1 :]))

    def __getitem__(self, name: str) -> Pass:
        return self.passes[self._index(name)]

    def _index(self, name: str) -> int:
        if name not in self.names():
            raise ValueError(
                f"got {name!r}, which is no pass of this pipeline; it takes the name of one: "
                f"{', '.join(self.names())}; see Pipeline.names()"
            )
        return self.names().index(name)

    def _with(self, passes: tuple[Pass, ...]) -> "Pipeline":
        return Pipeline(passes, self.needs_at_end)


def _require(
    known: dict[Fact, str | None], needed: frozenset[Fact], who: str, pipeline: Pipeline
) -> None:
    for fact in sorted(needed, key=str):
        if fact not in known:
            givers = [step.name for step in pipeline.passes if fact in step.gives]
            hint = f"; put {givers[0]!r} before it" if givers else "; no pass here gives it"
            raise ValueError(f"{who} needs the fact {fact.name!r}, which does not hold{hint}")
        if (breaker := known[fact]) is not None:
            raise ValueError(
                f"{who} needs the fact {fact.name!r}, which {breaker!r} broke; "
                f"run a pass that gives it after {breaker!r}"
            )


def verify_facts(step: Pass, graph: fx.Graph) -> None:
    """Asserts that every fact which the pass gives holds of the graph that it left."""
    for fact in step.gives:
        assert fact.holds(graph), f"pass {step.name!r} does not give {fact.name!r}"

"""Captures the rewritten modules of a unit in its other call forms.

The unit itself is captured once, in the model's training call. A mask, evaluation or autocast
changes few of its modules: only those whose own call differs, or that ask for the mode, are
captured again. A module that the call did not reach, as experts for images in a text, is captured
as its twins are called: modules of the same class in the same unit that it did reach. Modules that
are alike share a capture, whatever units they are in.
"""

import contextlib
import functools
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from torch import fx, nn

from moe_compile.capture.boundary import enter, exit
from moe_compile.capture.forms import observe
from moe_compile.capture.group import Group, differences, reads_agree
from moe_compile.capture.hidden import Hidden
from moe_compile.capture.probe import Call, structure
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.trace import Mode, trace
from moe_compile.rewrite.choices import known_choices, note_choices
from moe_compile.rewrite.dispatch_mask import note_ones, ones_of
from moe_compile.rewrite.unit_graph import UnitGraph


@dataclass
class Owners:
    """Every owner that was captured by itself, by what its capture holds for."""

    shadow: Shadow
    known: dict[Hashable, list[UnitGraph]] = field(default_factory=dict[Hashable, list[UnitGraph]])
    hidden: dict[Hashable, Hidden] = field(default_factory=dict[Hashable, Hidden])

    def capture(self, group: Group, first: UnitGraph) -> list[tuple[str, UnitGraph]]:
        """The owners of a unit's rewrites, in every foreseen call form that differs for them.

        Evaluation is taken to call them as training does; where it does not, they run their own
        code.

        Returns:
            an owner's name in the unit, and its capture or that of one that is alike, which may
            have been through the passes.
        """
        unit = self.shadow.model.get_submodule(first.name)
        found: list[tuple[str, UnitGraph]] = []
        if _holds_for_all(group, unit, first):
            return found
        for path, call, mode, is_first in _forms(self.shadow, group, first):
            owner = first.owners()[path]
            if not is_first:
                found.append((path, self._of(first, owner, path, call, mode, group.matters)))
            alone = replace(first, ep=None)
            for twin in _twins(unit, path, first):
                with contextlib.suppress(Exception):  # it need not be called so
                    own = self._of(alone, owner, twin, call, mode, group.matters)
                    found.append((twin, own))
        return found

    def _of(
        self,
        first: UnitGraph,
        owner: int,
        path: str,
        call: Call,
        mode: Mode,
        matters: set[str],
    ) -> UnitGraph:
        """A module that is called as the unit's call with the number `owner`."""
        arguments = _arguments(first.graph, owner)
        observed, shown = not _drops(first, owner), (ones_of(arguments), known_choices(arguments))
        module = self.shadow.model.get_submodule(first.name).get_submodule(path)
        key = (structure(module), call.key(), mode, observed, shown, first.ep is None)
        alike = self.known.setdefault(key, [])
        found = next((known for known in alike if reads_agree(known.reads, module)), None)
        if found is None:
            hidden = self.hidden.setdefault(key, Hidden())
            differing = differences((known.reads for known in alike), module)
            attempt = functools.partial(
                trace, self.shadow, module, call, mode, matters, observed=observed
            )
            capture = hidden.capture(attempt, differing)
            note_ones(_arguments(capture.graph, 0), shown[0])
            note_choices(_arguments(capture.graph, 0), shown[1])
            choice = first.wanted_providers, path, first.ep, first.contests
            found = UnitGraph.of(first.name, capture, *choice)
            alike.append(found)
        return found


def _holds_for_all(group: Group, unit: nn.Module, first: UnitGraph) -> bool:
    """Whether no owner is called in another way than in the unit's own capture."""
    owners = first.owners()
    others = len(group.forms) > 1 or any(_asks(first, p) or _twins(unit, p, first) for p in owners)
    return not owners or not others


def _asks(first: UnitGraph, path: str) -> bool:
    """Whether the code of an owner differs between training and evaluation."""
    return first.mode_of(first.owners()[path]).training is not None


def _forms(
    shadow: Shadow, group: Group, first: UnitGraph
) -> Iterator[tuple[str, Call, Mode, bool]]:
    """The owners' calls, each once, and whether the unit's own capture holds for it."""
    unit, owners = shadow.model.get_submodule(first.name), first.owners()
    seen: set[Hashable] = set()
    for number, (call, autocast) in enumerate(group.forms):
        calls: dict[str, Call] = {}
        with contextlib.suppress(Exception):  # a form in which the unit's own code fails
            observe(shadow, unit, call, autocast, owners, calls)
        for training, (path, own) in itertools.product((True, False), calls.items()):
            mode = Mode(training if _asks(first, path) else None, autocast)
            key = (path, own.key(), mode)
            if key not in seen:
                yield path, own, mode, number == 0 and training
            seen.add(key)


def _twins(unit: nn.Module, path: str, first: UnitGraph) -> list[str]:
    """Modules of the class of an owner that no call in the unit reached.

    Ranks may differ in whether they call one: its experts are not spread.
    """
    reached, kind = {call.path for call in first.calls}, type(unit.get_submodule(path))
    return [n for n, m in unit.named_modules() if type(m) is kind and n not in reached]


def _arguments(graph: fx.Graph, call: int) -> list[fx.Node]:
    """The tensors that a call gets."""
    begins = next(n for n in graph.nodes if n.target is enter and n.args[0] == call)
    return list(begins.args[1:])  # type: ignore[arg-type]


def _drops(unit: UnitGraph, call: int) -> bool:
    """Whether a rewrite removed an output of the call that nothing used."""
    ends = next(n for n in unit.graph.nodes if n.target is exit and n.args[0] == call)
    return None in ends.args

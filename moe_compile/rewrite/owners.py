"""Captures the rewritten modules of a unit in its other call forms.

The unit itself is captured once, in the model's training call. A mask, evaluation or autocast
changes few of its modules: only those whose own call differs, or that ask for the mode, are
captured again. A module that the call did not reach, as experts for images in a text, is captured
as its twins are called: modules of the same class in the same unit that it did reach.
"""

import contextlib
import itertools
from collections.abc import Hashable
from dataclasses import replace

from torch import nn

from moe_compile.capture.boundary import exit
from moe_compile.capture.forms import observe
from moe_compile.capture.group import Group
from moe_compile.capture.probe import Call
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.trace import Mode, trace
from moe_compile.rewrite.unit_graph import UnitGraph


def capture_owners(shadow: Shadow, group: Group, first: UnitGraph) -> list[UnitGraph]:
    """The owners of rewrites, captured in every foreseen call form that differs for them.

    Evaluation is taken to call them as training does; where it does not, they run their own code.
    """
    unit, owners = shadow.model.get_submodule(first.name), first.owners()
    seen: set[Hashable] = set()
    found: list[UnitGraph] = []
    for number, (call, autocast) in enumerate(group.forms if owners else []):
        calls: dict[str, Call] = {}
        with contextlib.suppress(Exception):  # a form in which the unit's own code fails
            observe(shadow, unit, call, autocast, owners, calls)
        for training, (path, own) in itertools.product((True, False), calls.items()):
            asks = first.mode_of(owners[path]).training is not None
            mode = Mode(training if asks else None, autocast)
            key, is_first = (path, own.key(), mode), number == 0 and training
            if key in seen:
                continue
            seen.add(key)
            observed = not _drops(first, owners[path])
            if not is_first:
                found.append(_capture(shadow, group, first, path, own, mode, observed))
            for twin in _twins(unit, path, first):
                with contextlib.suppress(Exception):  # it need not be called so
                    captured = _capture(shadow, group, first, twin, own, mode, observed)
                    found.append(replace(captured, ep=None))
    return found


def _twins(unit: nn.Module, path: str, first: UnitGraph) -> list[str]:
    """Modules of the class of an owner that no call in the unit reached.

    Ranks may differ in whether they call one: its experts are not spread.
    """
    reached, kind = {call.path for call in first.calls}, type(unit.get_submodule(path))
    return [n for n, m in unit.named_modules() if type(m) is kind and n not in reached]


def _capture(
    shadow: Shadow,
    group: Group,
    first: UnitGraph,
    path: str,
    call: Call,
    mode: Mode,
    observed: bool,
) -> UnitGraph:
    module = shadow.model.get_submodule(first.name).get_submodule(path)
    capture = trace(shadow, module, call, mode, group.matters, observed=observed)
    return UnitGraph.of(first.name, capture, first.wanted_providers, path, first.ep)


def _drops(unit: UnitGraph, call: int) -> bool:
    """Whether a rewrite removed an output of the call that nothing used."""
    ends = next(n for n in unit.graph.nodes if n.target is exit and n.args[0] == call)
    return None in ends.args

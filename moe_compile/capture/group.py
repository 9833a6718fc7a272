"""Groups: the units that one capture serves.

Two units share a capture when they have the same structure, are called alike, and agree on every
plain attribute that the traced code read; never because their class has the same name.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from moe_compile.capture.boundary import Attribute
from moe_compile.capture.forms import Form, call_forms, children_calls
from moe_compile.capture.hidden import Hidden
from moe_compile.capture.probe import Call, describe, structure
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.source import line_of
from moe_compile.capture.trace import Capture, Mode, trace
from moe_compile.capture.untouched import KINDS, OfKind


@dataclass
class Group:
    """Units that are captured once.

    Attributes:
        names: the units' names in the model, in order.
        capture: the units in the model's training call; None where they could not be captured.
        forms: how the model calls them, see `call_forms`; the capture is of the first.
        matters: the flags that the units' code looks at.
        problem: why the units could not be captured, or None.
        parts: how uncaptured units call their children, which are then units of their own.
        is_part: whether these are such children.
        holds_experts: whether uncaptured units may hold experts, by the shape of their parameters:
            those of `parts` left out.
    """

    names: list[str]
    capture: Capture | None
    forms: list[Form] = field(default_factory=list[Form])
    matters: set[str] = field(default_factory=set[str])
    problem: str | None = None
    parts: dict[str, Call] = field(default_factory=dict[str, Call])
    is_part: bool = False
    holds_experts: bool = True

    @property
    def reads(self) -> dict[Attribute, Any]:
        """Those of its capture."""
        return {} if self.capture is None else self.capture.reads

    def serves(self, unit: nn.Module) -> bool:
        """Whether a unit of the same structure and call may share the capture."""
        return reads_agree(self.reads, unit)

    def takes(self, other: "Group", model: nn.Module) -> bool:
        """Takes the capture of another group of the same kind, if it serves these units too."""
        units = map(model.get_submodule, self.names)
        if other.capture is None or not all(map(other.serves, units)):
            return False
        self.capture, self.forms, self.matters = other.capture, other.forms, other.matters
        return True


def group(shadow: Shadow, calls: dict[str, Call], *, autocast: bool = True) -> list[Group]:
    """Captures each kind of unit once, in the order in which the model calls them.

    Of a unit whose own code cannot be captured, each child is tried: as the unit's code calls it,
    or where that does not get there, as another unit calls its own. `autocast` is one more form
    of every call.
    """
    found = _Grouping(shadow, autocast)
    found.add([(name, call, False) for name, call in calls.items()])
    found.add(_as_twins_are_called(shadow, found))
    return found.groups


Unit = tuple[str, Call, bool]
"""A unit's name, how it is called, and whether it is a part of another."""


@dataclass
class _Grouping:
    """The groups so far, those whose units' own code cannot be traced, and what finds a unit's."""

    shadow: Shadow
    autocast: bool
    groups: list[Group] = field(default_factory=list[Group])
    untraced: list[Group] = field(default_factory=list[Group])
    found: dict[Hashable, list[Group]] = field(default_factory=dict[Hashable, list[Group]])
    hidden: dict[Hashable, Hidden] = field(
        default_factory=lambda: defaultdict[Hashable, Hidden](Hidden)
    )

    def add(self, units: list[Unit]) -> None:
        """Puts units into groups, and the parts of those that cannot be captured."""
        todo = units[::-1]
        while todo:
            name, call, is_part = todo.pop()
            home = self._home(self.shadow.model.get_submodule(name), call, is_part)
            home.names.append(name)
            todo += [(path_of(name, n), c, True) for n, c in reversed(home.parts.items())]

    def _home(self, unit: nn.Module, call: Call, is_part: bool) -> Group:
        kind = structure(unit), call.key(), is_part
        alike = self.found.setdefault(kind, [])
        home = next((g for g in alike if g.serves(unit)), None)
        if home is not None:
            return home
        differing = differences((g.reads for g in alike), unit)
        new = _capture(self.shadow, unit, call, self.autocast, self.hidden[kind], differing)
        home = next((g for g in alike if g.takes(new, self.shadow.model)), new)
        if home not in alike:
            home.is_part = is_part
            alike.append(home)
            self.groups.append(home)
            if home.capture is None and not is_part and call.state is None:
                self.untraced.append(home)
        return home


def _as_twins_are_called(shadow: Shadow, known: _Grouping) -> list[Unit]:
    """Parts that their own unit's code does not get to, as other units call theirs.

    What is captured so holds for calls of that form: should the unit call them otherwise, they run
    their own code.
    """
    found: list[Unit] = []
    for twin in [g for g in known.groups if not g.is_part] if known.untraced else []:
        model = shadow.model.get_submodule(twin.names[0])
        seen = dict(twin.parts)
        if twin.capture is not None:
            seen = children_calls(shadow, model, twin.forms[0][0])
        for home, path in itertools.product(known.untraced, seen):
            unit = shadow.model.get_submodule(home.names[0])
            is_twin = structure(_child(unit, path)) == structure(model.get_submodule(path))
            if path not in home.parts and is_twin:
                home.parts[path] = seen[path]
                home.holds_experts = _may_hold_experts(unit, home.parts)
                found += [(path_of(name, path), seen[path], True) for name in home.names]
    return found


def _child(unit: nn.Module, path: str) -> nn.Module:
    """The module at a path, or one without anything where there is none."""
    try:
        return unit.get_submodule(path)
    except AttributeError:
        return nn.Module()


def path_of(name: str, part: str) -> str:
    """The name in the model of a part of a unit; the model itself has the name ""."""
    return f"{name}.{part}" if name else part


def _capture(
    shadow: Shadow,
    unit: nn.Module,
    call: Call,
    autocast: bool,
    hidden: Hidden,
    differing: set[Attribute],
) -> Group:
    if call.state is not None:
        problem = f"its code may read {call.state}, which other code has left there"
        return Group([], None, problem=problem, holds_experts=_may_hold_experts(unit, ()))
    forms, problem = call_forms(call, autocast), call.problem
    while forms and call.problem is None:
        matters = set[str]()
        try:
            attempt = functools.partial(trace, shadow, unit, forms[0][0], Mode(), matters)
            capture = hidden.capture(attempt, differing)
            return Group([], capture, forms, matters)
        except Exception as error:  # foreign code may fail in any way; the report says how
            problem = problem or _described(error)
            forms = [form for form in forms if form[0] is not forms[0][0]]
    parts = children_calls(shadow, unit, call)
    holds_experts = _may_hold_experts(unit, parts)
    return Group([], None, problem=problem, parts=parts, holds_experts=holds_experts)


def _described(error: Exception) -> str:
    line = line_of(error)
    return describe(error) + (f" ({line})" if line else "")


def _may_hold_experts(unit: nn.Module, parts: Iterable[str]) -> bool:
    """Whether it has a list of modules, or a stack of matrices that is no convolution's."""
    apart = {m for path in parts for m in unit.get_submodule(path).modules()}
    owners = [m for m in unit.modules() if m not in apart and not isinstance(m, _ConvNd)]
    stacks = any(p.dim() == 3 for m in owners for p in m.parameters(recurse=False))
    return stacks or any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in owners)


def reads_agree(reads: dict[Attribute, Any], module: nn.Module) -> bool:
    """Whether a module has the attribute values that the capture of another one read."""
    return all(
        name == "training" or _same(getattr(module.get_submodule(path), name, None), value)
        for (path, name), value in reads.items()
    )


def differences(captures: Iterable[dict[Attribute, Any]], module: nn.Module) -> set[Attribute]:
    """Plain attributes that a module has other values of than captures of other ones read.

    Of the same type: code that asks whether one is None sees no difference between them.
    """
    found = set[Attribute]()
    for (path, name), read in itertools.chain.from_iterable(reads.items() for reads in captures):
        value = getattr(module.get_submodule(path), name, None)
        if type(value) in KINDS and type(value) is type(read) and value != read:
            found.add((path, name))
    return found


def _same(left: Any, right: Any) -> bool:
    """Whether an attribute has a value that a capture read, or one of its kind if that is all."""
    if left is right:
        return True
    if isinstance(right, OfKind):
        return type(left) is right.kind
    if isinstance(left, Tensor) or type(left) is not type(right):
        return False
    if isinstance(left, functools.partial):
        return _parts(left) == _parts(right)
    return bool(left == right)


def _parts(partial: Any) -> tuple[Any, ...]:
    return partial.func, partial.args, partial.keywords

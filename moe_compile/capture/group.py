"""Groups: the units that one capture serves.

Two units share a capture when they have the same structure, are called alike, and agree on every
plain attribute that the traced code read; never because their class has the same name.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.capture.forms import call_forms
from moe_compile.capture.probe import Call, structure, units
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.trace import Capture, Mode, trace


@dataclass
class Group:
    """Units that are captured once.

    Attributes:
        names: the units' names in the model, in order.
        capture: the units in the model's training call; None where they could not be captured.
        forms: how the model calls them, see `call_forms`; the capture is of the first.
        matters: the flags that the units' code looks at.
        problem: why the units could not be captured, or None.
    """

    names: list[str]
    capture: Capture | None
    forms: list[tuple[Call, torch.dtype | None]] = field(
        default_factory=list[tuple[Call, torch.dtype | None]]
    )
    matters: set[str] = field(default_factory=set[str])
    problem: str | None = None


def group(shadow: Shadow, calls: dict[str, Call]) -> list[Group]:
    """Captures each kind of unit once, in the order in which the model calls them."""
    found: dict[Hashable, list[Group]] = {}
    groups: list[Group] = []
    members = units(shadow.model)
    for name, call in calls.items():
        unit = members[name]
        alike = found.setdefault((structure(unit), call.key()), [])
        home = next((g for g in alike if _reads_agree(g, unit)), None)
        if home is None:
            home = _capture(shadow, unit, call)
            alike.append(home)
            groups.append(home)
        home.names.append(name)
    return groups


def _capture(shadow: Shadow, unit: nn.Module, call: Call) -> Group:
    if call.problem is not None:
        return Group([], None, problem=call.problem)
    forms, matters = call_forms(unit, call), set[str]()
    try:
        return Group([], trace(shadow, unit, forms[0][0], Mode(), matters), forms, matters)
    except Exception as error:  # foreign code may fail in any way; the report says how
        first_line = (str(error).splitlines() or [""])[0]
        return Group([], None, problem=f"{type(error).__name__}: {first_line}")


def _reads_agree(group: Group, unit: nn.Module) -> bool:
    """Whether the unit has the attribute values that the group's captures read."""
    reads = {} if group.capture is None else group.capture.reads
    return all(
        name == "training" or _same(getattr(unit.get_submodule(path), name), value)
        for (path, name), value in reads.items()
    )


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) or type(left) is not type(right):
        return False
    return bool(left == right)

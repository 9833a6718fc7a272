"""What no capture has seen: units that the probe did not get to, and experts beside its path."""

import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from moe_compile.capture.group import Group
from moe_compile.capture.probe import Probe, structure, units


@dataclass
class Missed:
    """Modules alike that no capture has seen: the first one's name, how many, and why."""

    name: str
    count: int
    reason: str


def unreached(
    model: nn.Module, probe: Probe, groups: list[Group], read: list[set[str]]
) -> list[Missed]:
    """What the report would miss.

    The first unit that a failed probe did not get to stands for all of them.

    Args:
        read: the parameters that captured code of each group reads, by name inside its units.
    """
    missed = [name for name in units(model) if name not in probe.calls]
    found: dict[Hashable, Missed] = {}
    if probe.problem is not None and missed:
        reason = f"the model's own code fails before it gets here: {probe.problem}"
        found[None] = Missed(missed[0], len(missed), f"{reason}; pass example_inputs")
    seen = _seen(model, groups, read)
    refused = [name for g in groups if g.capture is None and not g.parts for name in g.names]
    covered = [*refused, *(missed if found else [])]
    unexplained = f"{probe.inputs} does not reach it; pass example_inputs that do"
    problems = {name: g.problem for g in groups if g.problem is not None for name in g.names}
    for name, holder in _expert_holders(model):
        if not _within(name, covered) and not any(id(p) in seen for p in holder.parameters()):
            problem = problems.get(_within(name, problems))
            reason = f"its code could not be captured: {problem}" if problem else unexplained
            alike = re.sub(r"\d+", "#", name), structure(holder)
            found.setdefault(alike, Missed(name, 0, reason)).count += 1
            covered.append(name)
    return list(found.values())


def _within(name: str, modules: Iterable[str]) -> str:
    """The innermost of the modules that a module is, or is inside of; "" if there is none."""
    holding = [outer for outer in modules if not outer or f"{name}.".startswith(f"{outer}.")]
    return max(holding, key=len, default="")


def _seen(model: nn.Module, groups: list[Group], read: list[set[str]]) -> set[int]:
    """The parameters that captured code reads, as ids."""
    found: set[int] = set()
    for group, names in zip(groups, read, strict=True):
        for unit in map(model.get_submodule, group.names):
            named = unit.named_parameters(remove_duplicate=False)
            found |= {id(parameter) for name, parameter in named if name in names}
    return found


def _expert_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with stacks of matrices, flat ones too, or a row of alike MLPs, and a router near."""
    layers = units(model)
    for name, module in model.named_modules():
        counts = [*_stacks(module), *_row(module)]
        near = model.get_submodule(_within(name, layers) or name.rpartition(".")[0])
        if _is_flat(module, near) or any(_routes(near, module, count) for count in counts):
            yield name, module


def _stacks(module: nn.Module) -> list[int]:
    """How many matrices each of its stacks has."""
    own = [] if isinstance(module, _ConvNd) else module.parameters(recurse=False)
    return [p.shape[0] for p in own if p.dim() == 3 and p.shape[0] > 1]


def _is_flat(module: nn.Module, near: nn.Module) -> bool:
    """Whether it holds matrices alike, in whose rows lie as many experts as a router scores."""
    own = [p for p in module.parameters(recurse=False) if p.dim() == 2]
    shapes = {p.shape for p in own}
    if len(own) < 2 or len(shapes) > 1:
        return False
    ((rows, width),) = shapes
    beside = [p for p in near.parameters() if p.dim() == 2 and not any(p is o for o in own)]
    counts = [p.shape[0] for p in beside if p.shape[1] == width]
    return any(1 < count < rows and rows % count == 0 for count in counts)


def _row(module: nn.Module) -> list[int]:
    """How many modules of one structure it holds, each with two matrices or more."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or len(module) < 2:
        return []
    matrices = sum(p.dim() == 2 for p in next(module.children()).parameters())
    alike = len({structure(child) for child in module.children()}) == 1
    return [len(module)] if matrices >= 2 and alike else []


def _routes(near: nn.Module, holder: nn.Module, count: int) -> bool:
    """Whether some matrix of a layer, no member of a row, can score each of so many.

    None does beside a stack of tables, such as those of an image's rows and columns.
    """
    is_row = isinstance(holder, (nn.ModuleList, nn.ModuleDict))
    inner = {id(p) for p in holder.parameters()} if is_row else set[int]()
    scores = [p for p in near.parameters() if p.dim() == 2 and id(p) not in inner]
    return any(count in p.shape for p in scores)

"""Gathers the report from what the pipeline left behind."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from moe_compile.capture.group import Group, path_of
from moe_compile.capture.unreached import Missed
from moe_compile.install.sites import Installation
from moe_compile.ops import SENDS, attention, experts
from moe_compile.report import NearMissReport, PassSummary, Report, Site
from moe_compile.rewrite.anchors import (
    is_attention,
    is_fused_norm,
    is_norm,
    is_selection,
    selects_positions,
)
from moe_compile.rewrite.expert_products import expert_products
from moe_compile.rewrite.journeys import schedule
from moe_compile.rewrite.matcher import NearMiss, source_of
from moe_compile.rewrite.normal_form import aten
from moe_compile.rewrite.unit_graph import UnitGraph

_NEW_PATTERN = "write a pattern (docs/new_architecture.md)"

_GATES = {aten.mul.Tensor, aten.add.Tensor}
"""What weights are put together by, of which a mask is then where they are not zero."""


def summarize(
    groups: list[Group],
    units: list[list[UnitGraph]],
    installations: list[Installation],
    missed: list[Missed],
    head: list[Site],
    mesh: dict[str, int],
    seconds: dict[str, float],
) -> Report:
    """The report of one run."""
    sites: list[Site] = []
    beside = _beside_experts(groups, units)
    for group, graphs in zip(groups, units, strict=True):
        if group.problem is not None and (not group.parts or group.holds_experts):
            sites.append(_uncaptured(group))
        elif group.problem is not None and _attention_is_lost(group, groups, units):
            sites.append(replace(_uncaptured(group), kind="attention"))
        if graphs:
            routing = _routing_sites(group, graphs[0], beside=group.names[0] in beside)
            sites += [*routing.values(), *_product_sites(group, graphs[0], routing)]
            sites += _anchor_sites(group, graphs[0])
    for installation in installations:
        sites += installation.sites
    sites += [Site(m.name, m.count, "experts", None, "refused", m.reason) for m in missed]
    order = {name: i for i, name in enumerate(n for g in groups for n in g.names)}
    sites.sort(key=lambda site: order.get(_unit_of(site, order), 0))
    graphs = {id(unit.graph): unit for unit in itertools.chain(*units)}
    passes = _passes(list(graphs.values()))
    travels = _dispatchers(units), _schedules(groups, units)
    told = *travels, _not_quantized(groups, units)
    return Report((*sites, *head), passes, len(graphs), dict(mesh), dict(seconds), *told)


def _dispatchers(units: list[list[UnitGraph]]) -> dict[str, str | None]:
    nodes = [n for graphs in units for unit in graphs for n in unit.graph.nodes]
    planned = [n.meta for n in nodes if n.meta.get("op") in SENDS]
    return {meta["provider"]: meta["instead_of"] for meta in planned}


def _schedules(groups: list[Group], units: list[list[UnitGraph]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for group, graphs in zip(groups, units, strict=True):
        for unit in graphs[:1]:
            for path in unit.owners():
                why = unit.not_overlapped.get(path)
                told = [schedule(unit, path), why and f"nothing is moved: {why}"]
                if any(told):
                    found[_full_name(group, path)] = "; ".join(filter(None, told))
    return found


def _not_quantized(groups: list[Group], units: list[list[UnitGraph]]) -> dict[str, str]:
    return {
        _full_name(group, path): reason
        for group, graphs in zip(groups, units, strict=True)
        for unit in graphs[:1]
        for path, reason in unit.not_quantized.items()
    }


def _unit_of(site: Site, order: dict[str, int]) -> str:
    return next((n for n in order if f"{site.module}.".startswith(f"{n}.")), "")


def _uncaptured(group: Group) -> Site:
    reason = f"its code could not be captured: {group.problem}"
    kind = "experts" if group.holds_experts else "attention"
    return Site(group.names[0], len(group.names), kind, None, "refused", reason)


def _beside_experts(groups: list[Group], units: list[list[UnitGraph]]) -> set[str]:
    """The units that are parts of one whose experts are another part."""
    found: set[str] = set()
    known = {
        name
        for group, graphs in zip(groups, units, strict=True)
        if any(n.meta.get("op") is experts for unit in graphs[:1] for n in unit.graph.nodes)
        for name in group.names
    }
    for name, parts in ((name, group.parts) for group in groups for name in group.names):
        names = {path_of(name, part) for part in parts}
        found |= names if names & known else set()
    return found


def _attention_is_lost(group: Group, groups: list[Group], units: list[list[UnitGraph]]) -> bool:
    """Whether what an innermost uncaptured unit does itself is in no report of its parts."""
    parts = {path_of(group.names[0], part) for part in group.parts}
    below = [i for i, other in enumerate(groups) if parts & set(other.names)]
    nodes = [n for i in below for unit in units[i][:1] for n in unit.graph.nodes]
    uncaptured = any(groups[i].problem is not None for i in below)
    return not uncaptured and not any(n.meta.get("op") is attention for n in nodes)


def _routing_sites(group: Group, unit: UnitGraph, *, beside: bool) -> dict[str, Site]:
    """Routers that feed experts are kept; a selection that feeds none is a refused site.

    Args:
        beside: the experts are in another part of an uncaptured unit.

    Returns:
        the sites by the modules' names inside the unit.
    """
    routers = _routers(unit)
    sites: dict[str, Site] = {}
    for node in unit.graph.nodes:
        if not _is_own_selection(node) or selects_positions(node):
            continue
        path = unit.innermost(node)
        name = _full_name(group, path)
        if path in routers or beside:
            reason = "it runs as written: the experts need only its ids and weights"
            sites[path] = Site(name, len(group.names), "router", "top_k", "kept", reason)
        elif path not in sites:
            sites[path] = _unmatched(name, len(group.names), "experts", unit, node)
    return sites


def _product_sites(group: Group, unit: UnitGraph, routing: dict[str, Site]) -> Iterator[Site]:
    """Experts' weights in products that no match took, where no refused selection tells of them."""
    products = expert_products(unit.graph)
    refused = [path for path, site in routing.items() if site.status == "refused"]
    for holder, node in products.items():
        others = [other for other in products if other != holder and not _is_in(holder, other)]
        own = [path for path in refused if not any(_is_in(path, other) for other in others)]
        if not any(_tells_of(path, holder) for path in own):
            yield _unmatched(_full_name(group, holder), len(group.names), "experts", unit, node)


def _tells_of(selection: str, holder: str) -> bool:
    """Whether a selection is in the module that holds weights, around it, or beside it.

    One in a part of a block tells of all of the block's, as of LoRA's own weights for each expert.
    """
    beside, block = holder.rpartition(".")[0], selection.rpartition(".")[0]
    in_block = block != "" and _is_in(holder, block)
    return in_block or _is_in(selection, beside) or _is_in(holder, selection)


def _is_in(path: str, module: str) -> bool:
    """Whether a name is a module's, or that of a part of it; "" is the whole unit."""
    return not module or f"{path}.".startswith(f"{module}.")


def _anchor_sites(group: Group, unit: UnitGraph) -> list[Site]:
    """Norms and attention that no match took: refused, or torch's own."""
    sites: dict[tuple[str, str], Site] = {}
    for node in unit.graph.nodes:
        kind = "rms_norm" if is_norm(node) or is_fused_norm(node) else "attention"
        positions = is_selection(node) and selects_positions(node)
        if kind == "attention" and not positions and not is_attention(node):
            continue
        path = unit.innermost(node)
        site = _unmatched(_full_name(group, path), len(group.names), kind, unit, node)
        if positions:
            site = replace(site, pattern=None, reason="it selects positions")
        elif is_fused_norm(node):
            site = replace(site, pattern=None, status="kept", reason="it is torch's own kernel")
        sites.setdefault((path, kind), site)
    return list(sites.values())


def _full_name(group: Group, path: str) -> str:
    return f"{group.names[0]}.{path}" if path else group.names[0]


def _unmatched(name: str, layers: int, kind: str, unit: UnitGraph, node: fx.Node) -> Site:
    """A refused site with the nearest miss; that of a norm or attention is in the same module."""
    misses = [m for m in unit.near_misses.values() if m.kind == kind and m.is_close()]
    if kind != "experts":
        misses = [m for m in misses if m.calls[-1:] == node.meta["calls"][-1:]]
    best = max(misses, key=NearMiss.share, default=None)
    nothing = _nothing(kind, node)
    near = _nothing_near(node, nothing) if best is None else _near(best)
    reason = f"{best.progress()}; at {best.node}: {best.reason}" if best else nothing
    shown = near if kind == "experts" else None
    return Site(name, layers, kind, near.pattern, "refused", reason, near_miss=shown)


def _nothing(kind: str, node: fx.Node) -> str:
    """What there is to say where no pattern came near."""
    if kind != "experts":
        return "no known spelling"
    if is_selection(node):
        return "no known experts follow this selection"
    return "no known routing leads to this product with experts' weights"


def _near(miss: NearMiss) -> NearMissReport:
    remedy = miss.remedy or f"spell it as `before` in {miss.file}, or {_NEW_PATTERN}"
    node = f"{miss.node}, {miss.source}" if miss.source else miss.node
    return NearMissReport(miss.pattern, miss.progress(), node, miss.reason, remedy)


def _nothing_near(node: fx.Node, reason: str) -> NearMissReport:
    where = f"{node}, {source_of(node)}"
    progress = "no pattern has more than two operations that fit"
    return NearMissReport(None, progress, where, reason, _NEW_PATTERN)


def _routers(unit: UnitGraph) -> set[str]:
    """The modules in which the experts' ids are selected."""
    nodes = [n for n in unit.graph.nodes if n.meta.get("op") is experts]
    todo = [experts.arguments(*n.args, **n.kwargs)["ids"] for n in nodes]
    seen: set[fx.Node] = set()
    found: set[str] = set()
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if _is_own_selection(node):
            found.add(unit.owner(node))
        elif not _is_floating(node) or node.target in _GATES:
            todo += node.all_input_nodes
    return found


def _is_own_selection(node: fx.Node) -> bool:
    """Whether the model's own code selects: a rewrite may take ids out of a mask."""
    return is_selection(node) and "made_by" not in node.meta


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _passes(units: list[UnitGraph]) -> tuple[PassSummary, ...]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for record in (r for unit in units for r in unit.records):
        total = totals[record.name]
        total[0] += record.changed
        total[1] += record.nodes_before
        total[2] += record.nodes_after
        total[3] += record.seconds
    return tuple(
        PassSummary(name, int(changed), int(before), int(after), seconds)
        for name, (changed, before, after, seconds) in totals.items()
    )

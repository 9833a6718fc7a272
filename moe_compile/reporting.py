"""Gathers the report from what the pipeline left behind."""

from collections import defaultdict

import torch
from torch import fx

from moe_compile.capture.group import Group
from moe_compile.install.sites import Installation
from moe_compile.ops import dispatch, experts
from moe_compile.report import NearMissReport, PassSummary, Report, Site
from moe_compile.rewrite.matcher import NearMiss, source_of
from moe_compile.rewrite.unit_graph import UnitGraph

_SELECTIONS = {torch.ops.aten.topk.default, torch.ops.aten.argmax.default}
_MAX = torch.ops.aten.max.dim
_NEW_PATTERN = "write a pattern (docs/new_architecture.md)"


def summarize(
    groups: list[Group],
    units: list[list[UnitGraph]],
    installations: list[Installation],
    mesh: dict[str, int],
    seconds: dict[str, float],
) -> Report:
    """The report of one run."""
    sites: list[Site] = []
    for group, graphs in zip(groups, units, strict=True):
        if group.problem is not None and (not group.parts or group.holds_experts):
            sites.append(_uncaptured(group))
        if graphs:
            sites += _routing_sites(group, graphs[0])
    for installation in installations:
        sites += installation.sites
    order = {name: i for i, name in enumerate(n for g in groups for n in g.names)}
    sites.sort(key=lambda site: order.get(_unit_of(site, order), 0))
    captures = sum(map(len, units))
    return Report(
        tuple(sites), _passes(units), captures, dict(mesh), dict(seconds), _dispatchers(units)
    )


def _dispatchers(units: list[list[UnitGraph]]) -> dict[str, str | None]:
    nodes = [n for graphs in units for unit in graphs for n in unit.graph.nodes]
    planned = [n.meta for n in nodes if n.meta.get("op") is dispatch]
    return {meta["provider"]: meta["instead_of"] for meta in planned}


def _unit_of(site: Site, order: dict[str, int]) -> str:
    return next((n for n in order if f"{site.module}.".startswith(f"{n}.")), "")


def _uncaptured(group: Group) -> Site:
    reason = f"its code could not be captured: {group.problem}"
    kind = "experts" if group.holds_experts else "attention"
    return Site(group.names[0], len(group.names), kind, None, "refused", reason)


def _routing_sites(group: Group, unit: UnitGraph) -> list[Site]:
    """Routers that feed experts are kept; a selection that feeds none is a refused site."""
    routers = _routers(unit)
    sites: dict[str, Site] = {}
    for node in unit.graph.nodes:
        if not _is_selection(node):
            continue
        path = unit.owner(node)
        name = f"{group.names[0]}.{path}" if path else group.names[0]
        if path in routers:
            reason = "it runs as written: the experts need only its ids and weights"
            sites[path] = Site(name, len(group.names), "router", "top_k", "kept", reason)
        elif path not in sites:
            sites[path] = _unmatched(name, len(group.names), unit, node)
    return list(sites.values())


def _is_selection(node: fx.Node) -> bool:
    """Top-k, argmax, or a maximum whose place somebody uses."""
    if node.target is _MAX:
        return any(user.args[1:] == (1,) and user.users for user in node.users)
    return node.target in _SELECTIONS


def _unmatched(name: str, layers: int, unit: UnitGraph, selection: fx.Node) -> Site:
    misses = [m for m in unit.near_misses.values() if m.kind == "experts" and m.is_close()]
    best = max(misses, key=NearMiss.share, default=None)
    near = _nothing_near(selection) if best is None else _near(best)
    reason = f"{best.progress()}; at {best.node}: {best.reason}" if best else near.reason
    return Site(name, layers, "experts", near.pattern, "refused", reason, near_miss=near)


def _near(miss: NearMiss) -> NearMissReport:
    remedy = miss.remedy or f"spell it as `before` in {miss.file}, or {_NEW_PATTERN}"
    node = f"{miss.node}, {miss.source}" if miss.source else miss.node
    return NearMissReport(miss.pattern, miss.progress(), node, miss.reason, remedy)


def _nothing_near(selection: fx.Node) -> NearMissReport:
    node = f"{selection}, {source_of(selection)}"
    reason = "no known experts follow this selection"
    return NearMissReport(
        None, "no pattern has more than two operations that fit", node, reason, _NEW_PATTERN
    )


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
        if _is_selection(node):
            found.add(unit.owner(node))
        elif not _is_floating(node):
            todo += node.all_input_nodes
    return found


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _passes(units: list[list[UnitGraph]]) -> tuple[PassSummary, ...]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for record in (r for graphs in units for unit in graphs for r in unit.records):
        total = totals[record.name]
        total[0] += record.changed
        total[1] += record.nodes_before
        total[2] += record.nodes_after
        total[3] += record.seconds
    return tuple(
        PassSummary(name, int(changed), int(before), int(after), seconds)
        for name, (changed, before, after, seconds) in totals.items()
    )

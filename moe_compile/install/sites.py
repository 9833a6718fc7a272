"""From rewritten graphs to installable functions, and the sites of the report."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from moe_compile import ops
from moe_compile.adapters import transformers as hf
from moe_compile.capture.group import Group
from moe_compile.install.count_picks import Router, routers
from moe_compile.install.cut import cut
from moe_compile.install.forward import (
    Variant,
    bind,
    check_replaceable,
    make_forward,
    on_one_rank,
    variant,
)
from moe_compile.report import Choice, NearMissReport, Site
from moe_compile.rewrite.matcher import source_of
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.verify.parity import OwnCodeFails, Verifier


@dataclass
class Installation:
    """One owner module in every unit of a group.

    Attributes:
        units: the units' full names.
        path: the owner's name inside a unit.
        variants: the captured call forms; empty where nothing is installed.
        sites: what the report says of it.
        routers: the blocks of experts in the owner, by names inside a unit.
    """

    units: list[str]
    path: str
    variants: tuple[Variant, ...] = ()
    sites: list[Site] = field(default_factory=list[Site])
    routers: tuple[Router, ...] = ()

    def every_router(self) -> list[Router]:
        """The blocks of experts of every unit, by their full names."""
        return [
            Router(_inside(unit, r.module), r.index, r.experts, r.bias and _inside(unit, r.bias))
            for unit in self.units
            for r in self.routers
        ]

    def owner_names(self) -> list[str]:
        """The full names of the modules that are changed."""
        return [_inside(unit, self.path) for unit in self.units]


def _inside(unit: str, path: str) -> str:
    return f"{unit}.{path}" if path else unit


def prepare(
    model: nn.Module, group: Group, units: list[UnitGraph], verify: str, device: torch.device
) -> list[Installation]:
    """An installation for every module of the group that holds a rewrite.

    Each is verified on the device on which the model will train.
    """
    if not units:
        return []
    verifier = Verifier(model.get_submodule(group.names[0]), verify, device)
    return [_prepare_owner(model, group, units, path, verifier) for path in _owner_paths(units)]


def install(model: nn.Module, installation: Installation) -> None:
    """Binds the variants on the owner in every unit of the group."""
    if not installation.variants:
        return
    owners = [model.get_submodule(name) for name in installation.owner_names()]
    function = make_forward(type(owners[0]).forward, installation.variants)
    for owner in owners:
        bind(owner, function)


def lowered_nodes(unit: UnitGraph, path: str) -> list[fx.Node]:
    """The nodes that rewrites put into calls of one owner."""
    return [n for n in unit.graph.nodes if "op" in n.meta and unit.owner(n) == path]


def _owner_paths(units: list[UnitGraph]) -> list[str]:
    return list(dict.fromkeys(path for unit in units for path in unit.owners()))


def _prepare_owner(
    model: nn.Module, group: Group, units: list[UnitGraph], path: str, verifier: Verifier
) -> Installation:
    result = Installation(group.names, path)
    nodes = [node for unit in units for node in lowered_nodes(unit, path)]
    kept = next((n.meta["keeps"] for n in nodes if n.meta["keeps"]), None)
    if all(node.meta["keeps"] for node in nodes):
        result.sites = _sites(result, nodes, "kept", kept)
        return result
    try:
        result.variants, error = _variants(model, result, units, verifier)
        result.sites = [
            replace(site, error=error if site.numerics else None)
            for site in _sites(result, nodes, "rewritten", None)
        ]
        result.routers = routers(units[0], path)
    except Refuse as refusal:
        sites = _sites(result, nodes, "refused", refusal.reason)
        result.sites = [_with_near_miss(site, nodes, refusal) for site in sites]
    return result


def _with_near_miss(site: Site, nodes: list[fx.Node], refusal: Refuse) -> Site:
    """Of experts, with what stands against a rewrite whose pattern matched."""
    if site.kind != "experts":
        return site
    own = next(node for node in nodes if node.meta["kind"] == site.kind)
    node = refusal.node if isinstance(refusal.node, fx.Node) else own
    where = ", ".join(filter(None, (str(node), source_of(node) or source_of(own))))
    progress = "all operations fit, but the rewrite cannot be installed"
    remedy = refusal.remedy or "lift what stands against it; no other pattern is needed"
    near = NearMissReport(site.pattern, progress, where, refusal.reason, remedy)
    return replace(site, near_miss=near)


def _variants(
    model: nn.Module, installation: Installation, units: list[UnitGraph], verifier: Verifier
) -> tuple[tuple[Variant, ...], float | None]:
    """One variant for every call of the owner in every captured form, each verified.

    Returns:
        these, and the largest error that was found where passes are not exact.
    """
    owners = [model.get_submodule(name) for name in installation.owner_names()]
    found: list[Variant] = []
    errors: list[float | None] = []
    impossible: OwnCodeFails | None = None
    _check_single_path(model, units, installation.path)
    for unit in units:
        nodes = lowered_nodes(unit, installation.path)
        for call in dict.fromkeys(node.meta["calls"][-1] for node in nodes):
            piece = cut(unit, call)
            for owner in owners:
                check_replaceable(owner, piece.crossed)
            found.append(variant(piece, unit.mode_of(call), unit.reads, owners[0]))
            if found[-1].collective and piece.conditions is not None:
                raise Refuse("its code asks for sizes, so ranks could take different paths")
            if found[-1].collective and unit.calls[call].optional:
                raise Refuse("whether it is called depends on data, so ranks could differ")
            try:
                alone = on_one_rank(piece.graph, "alone")
                errors.append(verifier.check(unit, call, found[-1], alone))
            except OwnCodeFails as failure:
                impossible = failure
                found.pop()
    if impossible is not None and not found:
        raise impossible
    _check_ties(model, owners, {name for each in found for name in each.weights})
    return tuple(found), max((e for e in errors if e is not None), default=None)


def _check_single_path(model: nn.Module, units: list[UnitGraph], path: str) -> None:
    """A module with collectives makes the same ones in every form in which it is called."""
    forms = [unit for unit in units if unit.prefix in ("", path)]
    spread = [any(n.meta["op"] in ops.SENDS for n in lowered_nodes(u, path)) for u in forms]
    if not any(spread):
        return
    if path == "" and hf.is_pretrained(model):
        raise Refuse("its owner is the layer itself, which also runs with a key-value cache")
    if not all(spread):
        raise Refuse("its experts are found in some forms of its call only, and ranks may differ")


def _check_ties(model: nn.Module, owners: list[nn.Module], names: set[str]) -> None:
    """Experts that are spread over ranks belong to one module each."""
    own = [id(owner.get_parameter(name)) for owner in owners for name in names]
    every = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    if own and sum(map(set(own).__contains__, every)) != len(set(own)):
        raise Refuse("its experts are tied to those of another module")


def _sites(
    installation: Installation, nodes: list[fx.Node], status: Any, reason: str | None
) -> list[Site]:
    """One site for every kind of idiom in the owner."""
    kinds: dict[tuple[str, str], list[fx.Node]] = {}
    for node in nodes:
        kinds.setdefault((node.meta["kind"], node.meta["made_by"][1]), []).append(node)
    module, layers = installation.owner_names()[0], len(installation.units)
    return [
        Site(
            module,
            layers,
            kind,
            pattern,
            status,
            reason,
            _providers(own) if status == "rewritten" else None,
            timings=_choices(own),
            numerics=_numerics(own) if status == "rewritten" else None,
            tolerance=max(node.meta.get("tolerance", 0.0) for node in own),
        )
        for (kind, pattern), own in kinds.items()
    ]


def _providers(nodes: list[fx.Node]) -> str:
    return ", ".join(dict.fromkeys(node.meta["provider"] for node in nodes))


def _numerics(nodes: list[fx.Node]) -> str | None:
    """What numbers it computes with, where that is another result on purpose."""
    found = [node.meta["numerics"] for node in nodes if "numerics" in node.meta]
    return ", ".join(dict.fromkeys(found)) or None


def _choices(nodes: list[fx.Node]) -> tuple[Choice, ...]:
    """Every choice once: calls in other forms are often of the same shapes."""
    found: list[Choice] = []
    for choice in (node.meta["choice"] for node in nodes if "choice" in node.meta):
        if choice not in found:
            found.append(choice)
    return tuple(found)

"""The pipeline on one page: probe, trace, run the passes, install, verify, compile."""

import gc
import itertools
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.node import map_aggregate

from moe_compile.adapters.checkpoints import settle_dtypes
from moe_compile.balance import ROUTERS, Routers
from moe_compile.capture.group import Group, group
from moe_compile.capture.probe import probe
from moe_compile.capture.shadow import cast_shadow
from moe_compile.capture.unreached import Missed, unreached
from moe_compile.checkpoint.save import bind_save
from moe_compile.checks import check_config, check_mesh, check_model, check_passes
from moe_compile.config import CONFIG, OptimizeConfig
from moe_compile.install.compile import compile_options, compile_units, is_layer
from moe_compile.install.head import HeadPlan, install_head, plan_head
from moe_compile.install.sites import Installation, install, prepare
from moe_compile.parallel.agree import check_agreement, on_every_rank
from moe_compile.parallel.fsdp import check_ties, move
from moe_compile.parallel.layout import Layout, device_on, layout_of, whole_job
from moe_compile.parallel.shard import layer_names, shard
from moe_compile.passes import PIPELINE
from moe_compile.report import Report
from moe_compile.reporting import summarize
from moe_compile.rewrite.owners import Owners
from moe_compile.rewrite.pipeline import Pipeline, verify_facts
from moe_compile.rewrite.unit_graph import PassRecord, UnitGraph, copy_graph
from moe_compile.timing import Contests

M = TypeVar("M", bound=nn.Module)

_REPORT = "_moe_compile_report"


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Graphs are many small objects that live on: Python would look through them all the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Work:
    """What one run of the pipeline knows, from the groups to the installations."""

    layout: Layout | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: list[Group] = field(default_factory=list[Group])
    units: list[list[UnitGraph]] = field(default_factory=list[list[UnitGraph]])
    installations: list[Installation] = field(default_factory=list[Installation])
    missed: list[Missed] = field(default_factory=list[Missed])
    head: HeadPlan | None = None
    contests: Contests | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def timed(self, step: str) -> Generator[None]:
        """Adds the time of the block to a step of the report."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def contests_of(self, group: Group, config: OptimizeConfig) -> Contests | None:
        """Candidates for what is beside the layers run as they are: it is not compiled."""
        options = compile_options(config, self.device) if is_layer(group) else None
        return None if self.contests is None else replace(self.contests, options=options)

    def finish_contests(self) -> None:
        """Counts the time of timing by itself: it is part of that of the passes until here."""
        if self.contests is not None and self.contests.seconds:
            self.contests.progress.close()
            spent = sum(self.contests.seconds)
            self.seconds |= {"passes": self.seconds["passes"] - spent, "timing": spent}


def optimize(
    model: M,
    mesh: DeviceMesh | None = None,
    config: OptimizeConfig | None = None,
    *,
    passes: Pipeline | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> M:
    """Makes a mixture-of-experts model train fast; returns the same object.

    The class, the parameters and their names, hooks, `save_pretrained`, `generate`, Trainer and
    PEFT work as before. What was rewritten, kept or refused, and why: `report(model)`.

    Args:
        model: a loaded Hugging Face model, also on the meta device or wrapped by PEFT; or any
            `nn.Module` together with `example_inputs`.
        mesh: None for one device. Dimensions are called `dp_replicate`, `dp_shard` and `ep`; every
            rank has other data. The rest of the model is sharded by FSDP2 over all ranks.
        config: see `OptimizeConfig`.
        passes: the order of passes; `PIPELINE` by default.
        example_inputs: a tuple of positional or a dict of keyword arguments of the model, for a
            model that is not from transformers, or that text alone does not reach everywhere.

    Raises:
        ValueError: for a model that is optimized already or quantised, a wrong config, mesh or
            `passes`, or missing `example_inputs`; says what was got, what is taken and what to do.
    """
    config = OptimizeConfig() if config is None else config
    settle_dtypes(model)
    work = _analyze(model, mesh, config, PIPELINE if passes is None else passes, example_inputs)
    if work.layout is not None:
        check_agreement(_plan(model, config, work), work.layout)
    with work.timed("install"):
        for installation in work.installations:
            install(model, installation)
        sharded = work.layout is not None and config.fsdp is not False
        install_head(model, work.head, sharded=sharded)
    with work.timed("compile"):
        compile_units(model, work.groups, config, work.device)
    if work.layout is not None:
        with work.timed("shard"):
            shard(model, work.groups, work.installations, work.layout, config)
            bind_save(model, work.layout)
    elif mesh is not None:
        move(model, work.device)
    found = tuple(router for each in work.installations for router in each.every_router())
    group = None if work.layout is None or work.layout.group is None else work.layout.group
    setattr(model, ROUTERS, Routers(found, group and group.group_name))
    setattr(model, _REPORT, _summary(work))
    setattr(model, CONFIG, config)
    return model


def explain(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    config: OptimizeConfig | None = None,
    *,
    passes: Pipeline | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> Report:
    """The report that `optimize` would give; changes nothing. Same arguments and errors."""
    config = OptimizeConfig() if config is None else config
    pipeline = PIPELINE if passes is None else passes
    return _summary(_analyze(model, mesh, config, pipeline, example_inputs))


def report(model: nn.Module) -> Report:
    """What `optimize` did to the model.

    Raises:
        ValueError: if the model was not optimized.
    """
    found = getattr(model, _REPORT, None)
    if not isinstance(found, Report):
        raise ValueError(
            f"report got a {type(model).__name__} that was not optimized; it takes the model that "
            "optimize returned; call explain(model) to see what optimize would do"
        )
    return found


@_no_garbage_collection()
def _analyze(
    model: nn.Module,
    mesh: DeviceMesh | None,
    config: OptimizeConfig,
    pipeline: Pipeline,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
) -> Work:
    """Everything up to the installation; the model is not touched."""

    def check_all() -> None:
        check_model(model, example_inputs, optimized=hasattr(model, _REPORT))
        check_mesh(mesh, model)
        check_config(config, mesh)
        check_passes(pipeline)

    on_every_rank("optimize", check_all, whole_job(mesh))
    work = Work(layout_of(mesh))
    device = None if mesh is None else device_on(mesh)
    ranks, group = (1, None) if work.layout is None else (work.layout.ranks, work.layout.group)

    def analyze() -> None:
        _capture(model, config, pipeline, example_inputs, work, device)

    on_every_rank("optimize", analyze, ranks, group)
    return work


def _capture(
    model: nn.Module,
    config: OptimizeConfig,
    pipeline: Pipeline,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
    work: Work,
    device: torch.device | None,
) -> None:
    """Fills in what one rank finds out by itself; `device` is the mesh's."""
    work.head = plan_head(model, config)
    with work.timed("probe"):
        shadow = cast_shadow(model, device)
        work.device = shadow.device
        probed = probe(shadow, example_inputs)
    sizes = shadow.batch, shadow.sequence
    work.contests = Contests.of(config, work.device, work.layout, *sizes)
    owners = Owners(shadow)
    with work.timed("trace"):
        work.groups = group(shadow, probed.calls, autocast=config.autocast)
    for found in work.groups:
        work.units.append(_rewrite(owners, found, pipeline, config, work))
    work.finish_contests()
    read = [set[str]().union(*map(UnitGraph.parameters, _told(units))) for units in work.units]
    work.missed = unreached(model, probed, work.groups, read)
    with work.timed("verify"):
        for found, units in zip(work.groups, work.units, strict=True):
            work.installations += prepare(model, found, units, config.verify, work.device)
    if work.layout is not None:
        check_ties(model, layer_names(work.groups))


def _rewrite(
    owners: Owners, found: Group, pipeline: Pipeline, config: OptimizeConfig, work: Work
) -> list[UnitGraph]:
    """The group's graphs after the passes: the unit first, then its owners in other call forms."""
    if found.capture is None:
        return []
    ep = None if work.layout is None else work.layout.ep(config.max_tokens_per_rank)
    contests = work.contests_of(found, config)
    wanted = config.wanted_providers()
    first = UnitGraph.of(found.names[0], found.capture, wanted, ep=ep, contests=contests)
    check = config.verify == "full"
    with work.timed("passes"):
        run_passes(pipeline, first, check=check)
    with work.timed("trace"):
        others = owners.capture(found, first)
    with work.timed("passes"):
        for _, unit in others:
            if not unit.records:
                unit.not_quantized |= first.not_quantized  # a part may not show what it is for
                run_passes(pipeline, unit, check=check)
    return [first, *(unit.at(first.name, path) for path, unit in others)]


def _told(units: list[UnitGraph]) -> list[UnitGraph]:
    """Those of a group that the report tells of: the first, and what was rewritten in others."""
    return [unit for i, unit in enumerate(units) if i == 0 or unit.owners()]


def run_passes(pipeline: Pipeline, unit: UnitGraph, *, check: bool = False) -> None:
    """Runs the passes on one unit, recording what each did; `check` verifies the facts."""
    for step in pipeline:
        start, before = time.perf_counter(), len(unit.graph.nodes)
        if not step.exact and unit.raised is None:
            unit.raised = copy_graph(unit.graph)
        changed = step.run(unit)
        seconds = time.perf_counter() - start
        after = len(unit.graph.nodes)
        unit.records.append(PassRecord(step.name, changed, before, after, unit.ops(), seconds))
        if check:
            verify_facts(step, unit.graph)


def _plan(model: nn.Module, config: OptimizeConfig, work: Work) -> list[str]:
    """What this rank is about to do, a line for each thing."""
    state = [f"{n}: {t.dtype} {tuple(t.shape)}" for n, t in model.state_dict().items()]
    graphs = [
        f"{unit.name}: {line}"
        for unit in itertools.chain(*work.units)
        for line in graph_lines(unit.graph, work.device, unit.ep and unit.ep.group)
    ]
    options = _without_addresses(repr(config))
    # What was measured decides nothing any more; each rank has its own words for what failed.
    sites = [str(replace(site, timings=(), error=None)) for site in _summary(work).sites]
    return [options, str(work.layout), *sites, *state, *graphs]


def graph_lines(graph: fx.Graph, device: torch.device, group: str | None = None) -> list[str]:
    """A graph as text that is the same on every rank.

    Each has addresses of objects, a device, and perhaps an expert-parallel group of its own.
    """
    graph = copy_graph(graph)
    for node in graph.nodes:
        args: Any = map_aggregate(
            node.args, lambda a: "ep" if isinstance(a, str) and a == group else a
        )
        node.args = args
    text = str(graph).replace(str(device), device.type)
    return _without_addresses(text).splitlines()


def _without_addresses(text: str) -> str:
    """What objects without a `repr` of their own are called, a backend's for example."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _summary(work: Work) -> Report:
    mesh = {} if work.layout is None else work.layout.sizes
    found = work.groups, work.units, work.installations, work.missed
    head = [] if work.head is None else [work.head.site]
    return summarize(*found, head, mesh, work.seconds)

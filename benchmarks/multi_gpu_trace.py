"""How much of a step's communication runs beside computation, from a profiler's trace."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from multi_gpu_peers import build, shape_of
from one_gpu import step_of
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]

_NAME = 40
"""The letters of a kernel's name that are shown."""

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")


def trace(args: argparse.Namespace) -> list[float | str]:
    """Microseconds of this rank: tokens' travels, what of it is beside computation, that, and all.

    Last, which two kernels ran beside each other for longest.
    """
    peer, rank = args.peers[0], dist.get_rank()
    model = build(peer, args)
    generator = torch.Generator().manual_seed(rank + 1)
    shape = args.batch[0], args.length
    ids = torch.randint(shape_of(args).vocab_size, shape, generator=generator).to(args.device)
    step = step_of(peer, model)
    for _ in range(args.warmup):
        step(ids)
        model.zero_grad()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not args.tiny)
    with profile(activities=activities) as found:
        step(ids)
        if not args.tiny:
            torch.cuda.synchronize()
    args.trace.mkdir(parents=True, exist_ok=True)
    file = args.trace / f"{peer}-{args.batch[0]}-rank{rank}.json"
    found.export_chrome_trace(str(file))
    return measured(file, travel(peer, args.tiny), on_gpu=not args.tiny)


def travel(peer: str, tiny: bool) -> str:
    """What the names of a peer's exchanges of tokens hold; of NCCL's kernels, also FSDP2's."""
    if tiny:
        return "gloo:"
    return "deep_ep" if peer.startswith(("moe_deepep", "automodel")) else "nccl"


def measured(file: Path, word: str, *, on_gpu: bool) -> list[float | str]:
    """The microseconds of a trace: see `trace`."""
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") == "kernel"] if on_gpu else events
    exchanges = [e for e in kernels if word in e["name"]]
    if on_gpu:
        computing = [e for e in kernels if word not in e["name"] and "nccl" not in e["name"]]
    else:
        computing = [e for e in kernels if e["name"] in PRODUCTS]
    away, busy = spans(exchanges), spans(computing)
    both = merged(away + busy)
    beside = length(away) + length(busy) - length(both)
    whole = both[-1][1] - both[0][0]
    return [length(away), beside, length(busy), whole, longest_pair(exchanges, computing)]


def longest_pair(exchanges: list[dict[str, Any]], computing: list[dict[str, Any]]) -> str:
    """The exchange and the computation that ran at the same time for longest."""
    pairs = [(shared(a, b), a["name"], b["name"]) for a in exchanges for b in computing]
    longest, first, second = max(pairs, default=(0.0, "", ""))
    if longest <= 0:
        return "-"
    return f"{first[:_NAME]} and {second[:_NAME]}: {longest:,.0f} us"


def shared(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The microseconds in which both ran; none where it is negative."""
    ends = (float(e["ts"]) + float(e["dur"]) for e in (a, b))
    return min(ends) - max(float(a["ts"]), float(b["ts"]))


def spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """When events of one kind ran, without overlaps."""
    return merged([(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events])


def merged(every: list[Span]) -> list[Span]:
    """The union of spans."""
    union: list[Span] = []
    for start, end in sorted(every):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


def length(every: list[Span]) -> float:
    """The microseconds in spans that do not overlap."""
    return sum(end - start for start, end in every)

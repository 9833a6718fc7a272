"""What multi_gpu.py checks beside times: gradients, curves of losses, dispatch and combine alone.

Each function is one rank's, and returns what rank 0 writes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepep_one_gpu import call_of, cells, errors_of, expected, picked, sizes_of, step, whole, world
from multi_gpu_peers import build, materialize, on_meta, optimizer_of
from one_gpu import step_of
from torch import Tensor

from moe_compile import ops
from moe_compile.providers.all_to_all import AllToAllProvider
from moe_compile.providers.deepep import DeepEPProvider

RATE = 3e-4
TOKENS = 8192


def check(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of errors against the unsharded model, and against moe_all_to_all's, if that ran."""
    args.layers, args.tokens = min(args.layers, 2), min(args.length, 512)
    args.bound = args.tokens + 32 * (args.ranks - 1)
    reference = on_meta(args)
    materialize(reference, args)
    want = expected(reference, args)
    del reference
    rows, base = list[tuple[str, ...]](), dict[str, Any]()
    for peer, way in ways(args.peers[0].split(",")):
        options = {"compile": False} if peer.startswith("moe") and way == "no" else {}
        model = build(peer, args, **options)
        got = whole(step(model, **call_of(dist.get_rank(), args)), averaged=True)
        del model
        base = {way: got} if peer == "moe_all_to_all" else base
        against = f"{max(errors_of(got, base[way]).values()):.1e}" if way in base else "-"
        rows.append((peer, way, *cells(errors_of(got, want)), against))
    return rows


def ways(peers: list[str]) -> list[tuple[str, str]]:
    """Each peer, and whether it is compiled; moe_compile's peers go both ways."""
    plain = [(peer, "yes" if peer == "hf_compile" else "no") for peer in peers if "hf" in peer]
    ours = [peer for peer in peers if peer.startswith("moe")]
    return plain + [(peer, way) for way in ("no", "yes") for peer in ours]


def curve(args: argparse.Namespace) -> list[float]:
    """The ranks' mean loss at each step of training on a text."""
    peer = args.peers[0]
    model = build(peer, args)
    optimizer = optimizer_of(model, RATE)
    step = step_of(peer, model)
    losses: list[Tensor] = []
    for number in range(args.curve):
        loss = step(text_of(number, args))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.float())
    mean = torch.stack(losses) / args.ranks
    dist.all_reduce(mean)
    return mean.tolist()


def text_of(number: int, args: argparse.Namespace) -> Tensor:
    """A rank's bytes of a step: the text goes round, and no two ranks read the same."""
    from pydoc_data import topics

    text = torch.tensor(list("\n".join(topics.topics.values()).encode()))
    count = args.batch[0] * args.length
    first = (number * args.ranks + dist.get_rank()) * count
    ids = text[torch.arange(first, first + count) % len(text)]
    return ids.view(args.batch[0], args.length).to(args.device)


def dispatch(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each dispatcher: bytes, and times of the slowest rank."""
    tokens = 24 if args.tiny else TOKENS
    x, ids, weights = picked(tokens, args)
    leaves = x.requires_grad_(), weights.requires_grad_()
    sent = bytes_sent(x, ids, args)
    rows: list[tuple[str, ...]] = []
    for name, provider, bound in (
        ("all_to_all", AllToAllProvider(), None),
        ("deepep", DeepEPProvider(), None),
        ("deepep, bound", DeepEPProvider(), tokens),
    ):
        forward, backward = passes(provider, leaves, ids, bound, args)
        alone, both = milliseconds(forward, args), milliseconds(backward, args)
        rates = f"{sent / alone / 1e6:.0f}", f"{2 * sent / both / 1e6:.0f}"
        times = f"{alone:.2f} ms", f"{both:.2f} ms"
        rows.append((name, f"{sent / 1e6:.1f}", times[0], rates[0], times[1], rates[1]))
    return rows


def passes(
    provider: Any, leaves: tuple[Tensor, ...], ids: Tensor, bound: int | None, args: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """There and back without gradients, and with the backward, which travels as much again."""
    send, back = map(provider.implementation, (ops.dispatch, ops.combine))
    (x, weights), experts = leaves, sizes_of(args)["num_experts"]

    def there_and_back() -> tuple[Tensor, Tensor]:
        rows, _, theirs, _, handle = send(x, ids, weights, experts, world(), bound)
        return back(rows, handle, len(x), world()), theirs

    def with_backward() -> Any:
        outs = there_and_back()
        cotangents = [torch.ones_like(outs[0]), torch.zeros_like(outs[1])]
        return torch.autograd.grad(outs, leaves, cotangents)

    return torch.no_grad()(there_and_back), with_backward


def bytes_sent(x: Tensor, ids: Tensor, args: argparse.Namespace) -> float:
    """Bytes of rows that a rank must send to others, there and back, the mean over ranks."""
    owners = ids // (sizes_of(args)["num_experts"] // args.ranks)
    others = [rank for rank in range(args.ranks) if rank != dist.get_rank()]
    rows = torch.stack([(owners == rank).any(1).sum() for rank in others]).sum()
    dist.all_reduce(rows)
    return 2 * int(rows) / args.ranks * x.shape[1] * x.element_size()


def milliseconds(function: Callable[[], Any], args: argparse.Namespace) -> float:
    """The median time of a call, of the slowest rank."""
    times = [timed(function, args) for _ in range(args.warmup + 4 * args.steps)]
    slowest = torch.tensor(times[args.warmup :], dtype=torch.float64, device=args.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def timed(function: Callable[[], Any], args: argparse.Namespace) -> float:
    """Milliseconds of one call, by the device's clock."""
    dist.barrier()
    if args.tiny:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)

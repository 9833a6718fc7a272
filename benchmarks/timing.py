"""Times, kernels and errors, as the benchmarks of one device measure them."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_SLEEP = 40_000_000
"""Cycles, some 20 ms, in which the processor launches what is timed then."""
_CHUNK = 2**26
"""Elements that are compared at a time, since gradients may fill the memory."""


def timed(run: Callable[[], Any], repeats: int = 1) -> float:
    """Milliseconds of a call, the mean of some in a row, by the device's clock if there is one."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) * 1e3 / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def milliseconds(run: Callable[[], Any], repeats: int = 20, *, ahead: bool = False) -> float:
    """Mean time of a call, after four others.

    `ahead` lets the device wait while the calls are launched: what is left is the kernels' time.
    """
    for _ in range(4):
        run()
    if ahead and torch.cuda.is_available():
        torch.cuda._sleep(_SLEEP)
    return timed(run, repeats)


def show_kernels(name: str, run: Callable[[], Any], *, steps: int = 3, top: int = 26) -> None:
    """Prints where the device's time goes; on a CPU, where the processor's does."""
    on_device = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(steps):
            run()
    field = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, field))
    print(f"{name}: kernel, calls and ms a step")
    for event in events[:top]:
        print(f"  {getattr(event, field) / steps / 1e3:7.3f}", end="")
        print(f"  {event.count // steps:3d}  {event.key[:100]}")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """In L2 norm; either may lie on another device."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} against {tuple(wanted.shape)}"
    squares = [0.0, 0.0]
    pairs = (t.detach().reshape(-1).split(_CHUNK) for t in (found, wanted))
    for ours, theirs in zip(*pairs, strict=True):
        exact = theirs.to(ours.device).float()
        squares[0] += float((ours.float() - exact).square().sum(dtype=torch.float64))
        squares[1] += float(exact.square().sum(dtype=torch.float64))
    return (squares[0] / (squares[1] or 1.0)) ** 0.5


def worst(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest relative error."""
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def failure(error: BaseException) -> str:
    """An exception as a cell of a table."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:80]}".replace("|", "/")

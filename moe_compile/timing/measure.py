"""The time of one forward and backward of implementations, each run as a layer would run it."""

import contextlib
import statistics
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moe_compile.install.own_code import with_own_code

_WARM_UPS = 3
_SECONDS = 0.2
_FEWEST, _MOST = 5, 100
_FLUSH_BYTES = 256 * 2**20
_CPU_BYTES = 4 * 2**30


def free_bytes(device: torch.device) -> int:
    """What timing may take; of a CPU, whose free memory torch does not know, 4 GiB."""
    if device.type != "cuda":
        return _CPU_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def prepare(
    implementation: Callable[..., Any],
    inputs: Mapping[str, Any],
    device: torch.device,
    options: Mapping[str, Any] | None,
    autocast: torch.dtype | None,
) -> Callable[[], None]:
    """A forward and backward, compiled and warm.

    Args:
        implementation: of a canonical op.
        inputs: its arguments; the gradients of those that require one are made and let go of.
        device: where the inputs are.
        options: for `torch.compile`; None for code that runs as it is.
        autocast: to this dtype; None without it.
    """
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    rest = {name: value for name, value in inputs.items() if name not in names}

    def call(*tensors: Tensor) -> Any:
        return implementation(**dict(zip(names, tensors, strict=True)), **rest)

    program = call if options is None else _compiled(call, options)
    step = _step(program, [inputs[name] for name in names], device, autocast)
    for _ in range(_WARM_UPS):
        step()
    return step


def milliseconds(steps: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """The median time of each step. They take turns, so that what disturbs one disturbs all."""
    clock = _cuda_round if device.type == "cuda" else _cpu_round
    whole = max(sum(clock(list(steps.values()), device)), 1e-3)
    rounds = min(max(int(_SECONDS * 1e3 * len(steps) / whole), _FEWEST), _MOST)
    times = [clock(list(steps.values()), device) for _ in range(rounds)]
    medians = map(statistics.median, zip(*times, strict=True))
    return dict(zip(steps, medians, strict=True))


def _compiled(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    # Torch takes what it knows out of the inner options, which are the user's.
    own: dict[str, Any] = {n: dict(o) if n == "options" else o for n, o in options.items()}
    own["dynamic"] = False
    assert isinstance(function, types.FunctionType)
    return torch.compile(with_own_code(function, "timed"), **own)


def _step(
    program: Callable[..., Any],
    tensors: list[Tensor],
    device: torch.device,
    autocast: torch.dtype | None,
) -> Callable[[], None]:
    """One forward and backward; gradients are made and let go of."""
    wanted = [t for t in tensors if t.requires_grad]
    cotangents: list[Tensor] = []

    def step() -> None:
        with _autocast(device, autocast):
            results = pytree.tree_leaves(program(*tensors))
        outputs = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if not cotangents:
            cotangents.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)

    return step


def _autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _cpu_round(steps: list[Callable[[], None]], device: torch.device) -> list[float]:
    times: list[float] = []
    for step in steps:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_round(steps: list[Callable[[], None]], device: torch.device) -> list[float]:
    """By the device's clock. Inputs come from its memory, as a layer's do, not from its cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    with torch.cuda.device(device):
        for step in steps:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]

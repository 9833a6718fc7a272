"""Runs a function on several ranks: processes of this machine, joined by gloo."""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_TIMEOUT = 300


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank; fails with the tracebacks of those that fail.

    The function is a module's own; what it returns is pickled.
    """
    with start_ranks(ranks, function, *args) as (processes, queue):
        answers = dict(queue.get(timeout=_TIMEOUT) for _ in processes)
    failures = [f"rank {r}:\n{text}" for r, (fine, text) in sorted(answers.items()) if not fine]
    assert not failures, "\n".join(failures)
    return [answers[rank][1] for rank in range(ranks)]


@contextlib.contextmanager
def start_ranks(
    ranks: int, function: Callable[..., Any], *args: Any
) -> Generator[tuple[list[Any], Any]]:
    """The processes, and where each puts its rank, whether it went well, and what it returned."""
    _CONTEXT.set_forkserver_preload(_preloaded())
    with tempfile.TemporaryDirectory() as folder:
        queue: Any = _CONTEXT.Queue()
        processes = [
            _CONTEXT.Process(target=_work, args=(rank, ranks, folder, queue, function, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            yield processes, queue
        finally:
            for process in processes:
                process.join(10)
                process.kill()


def _preloaded() -> list[str]:
    """What the ranks are forked with: no capture where it would begin CUDA, as no fork has that."""
    captured = ["tests.first_capture", "torch._decomp.decompositions_for_jvp"]
    return ["tests.ranks"] if torch.cuda.is_available() else [*captured, "tests.ranks"]


def _work(
    rank: int,
    ranks: int,
    folder: str,
    queue: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=_TIMEOUT),
    )
    try:
        queue.put((rank, (True, function(*args))))
    except BaseException:  # whatever it is, the test prints it
        queue.put((rank, (False, traceback.format_exc())))
    finally:
        queue.close()
        queue.join_thread()
        # Not destroyed: a rank that failed would wait there for the others.
        os._exit(0)

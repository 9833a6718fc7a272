"""Where each rank is, for the message when a job ends: which rank failed, or hung, in which layer.

A rank notes every layer that it enters, forward and backward, outside of what is compiled. Under
torchrun the note is in the file from which torchrun reads why a rank failed
(`TORCHELASTIC_ERROR_FILE`): it is there whatever becomes of the rank, torchrun prints it, and ranks
of one machine can read each other's. A rank that waits for another in vain gets an error when that
one is gone, or after the process group's timeout; then it says which ranks have not failed, and
where they are.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]

_BYTES = 4096
_PATIENCE = 0.5
"""Seconds in which all ranks that wait for the same one get their errors."""


def watch(model: nn.Module, layers: list[str]) -> None:
    """Notes each of the layers that this rank enters, and tells of it when an error ends it."""
    _note_of_this_process()
    for name in layers:
        layer = model.get_submodule(name)
        # Before FSDP2's own hooks, which wait for other ranks.
        layer.register_forward_pre_hook(partial(_enter, f"the forward of {name}"), prepend=True)
        layer.register_forward_hook(partial(_leave, f"the backward of {name}"), prepend=True)


def _enter(place: str, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        _note_of_this_process().enter(place)


def _leave(place: str, module: nn.Module, args: Any, output: Any) -> None:
    """The backward of a layer begins with its output's gradient."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and first.requires_grad and not torch.compiler.is_compiling():
        first.register_hook(partial(_enter, place))


class _Note:
    """Where this process is, and the file that says so."""

    def __init__(self, rank: int, path: str | None) -> None:
        self.place = "what comes before its layers"
        self._rank = rank
        self._path = None if path is None else Path(path)
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT)

    def enter(self, place: str) -> None:
        """Notes a place; this runs twice in every layer."""
        self.place = place
        self._write(_beginning(f"rank {self._rank} was in {place}"))

    def fail(self, error: BaseException) -> str:
        """Notes an error, and returns what is to be said of it."""
        reason = " ".join(repr(error).split())[:400]
        text = f"rank {self._rank} failed in {self.place}: {reason}"
        # Torch's `record` may have written more than we know.
        if self._file is not None and os.fstat(self._file).st_size in (0, _BYTES):
            self._write(_beginning(text))
        return text

    def _write(self, beginning: bytes) -> None:
        """In one call, so that it is never half there."""
        if self._file is not None:
            os.pwrite(self._file, b'%s%010d"}}}' % (beginning, time.time()), 0)

    def others(self) -> list[str]:
        """Where the ranks of this machine are that have not failed."""
        found = [] if self._path is None else self._path.parents[1].glob(f"*/{self._path.name}")
        return [said for said in map(_said, sorted(found)) if said is not None]


@cache
def _note_of_this_process() -> _Note:
    """Made when it is first needed; from then on an error that nobody catches is told of."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    note = _Note(rank, os.environ.get("TORCHELASTIC_ERROR_FILE"))
    sys.excepthook = partial(_tell, sys.excepthook, note)
    return note


@cache
def _beginning(text: str) -> bytes:
    """All but the time, in a length that is always the same, in the form that torchrun reads."""
    start = f'{{"message": {{"message": {json.dumps(text, ensure_ascii=False)},'.encode()
    end = b'"extraInfo": {"timestamp": "'
    return start.ljust(_BYTES - len(end) - len('0123456789"}}}')) + end


def _said(path: Path) -> str | None:
    """What the rank of a file says, unless it has failed, or says nothing."""
    try:
        message = json.loads(path.read_bytes())["message"]
    except json.JSONDecodeError:
        return None
    if "py_callstack" in message["extraInfo"] or " failed in " in message["message"]:
        return None
    seconds = time.time() - path.stat().st_mtime
    return f"{message['message']}, which it entered {seconds:.1f} s ago, and has not failed"


def _tell(
    previous: _Hook,
    note: _Note,
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    """The last thing that a process does when nobody catches an error."""
    _say(note.fail(error))
    if _is_of_another(error):
        time.sleep(_PATIENCE)
        for other in note.others():
            _say(other)
    previous(kind, error, traceback)


def _is_of_another(error: BaseException) -> bool:
    """Whether a rank waited for others in vain; gloo's errors are of no kind of their own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _say(text: str) -> None:
    print(f"moe_compile: {text}", file=sys.stderr, flush=True)

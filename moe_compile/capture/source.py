"""Which line of the model's source each node of a trace comes from.

torch can keep whole stack traces, which is slow; one line of each node is had for nothing from the
frames that are there when the node is made.
"""

import contextlib
import functools
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from torch import fx

_TRACERS = {"torch", "moe_compile"}
_STDLIB = sysconfig.get_path("stdlib")
_SITE = sysconfig.get_path("purelib")


@contextlib.contextmanager
def recorded_lines() -> Generator[None]:
    """Notes in `meta["source"]` of every new node the line that runs, and None outside of models.

    What called the function that this context is used in is not looked at.
    """
    create: Any = fx.Graph.create_node
    outermost = sys._getframe(2)  # between this frame and the function there is contextlib's

    def create_node(*args: Any, **kwargs: Any) -> fx.Node:
        node = create(*args, **kwargs)
        node.meta["source"] = _line(sys._getframe(1), outermost)
        return node

    with mock.patch.object(fx.Graph, "create_node", create_node):
        yield


def line_of(error: Exception) -> str | None:
    """The innermost line of a model that was running when the error was raised."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _is_model_code(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
            return _described(frame.f_code.co_filename, number, frame.f_code.co_name)
    return None


def _line(frame: FrameType | None, outermost: FrameType) -> str | None:
    while frame is not None and frame is not outermost:
        code = frame.f_code
        if _is_model_code(code.co_filename, frame.f_globals.get("__name__", "")):
            return _described(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back
    return None


@functools.cache
def _is_model_code(path: str, module: str) -> bool:
    """Neither that of torch, nor ours, nor Python's own."""
    if module.split(".")[0] in _TRACERS or path.startswith("<"):
        return False
    return path.startswith(_SITE) or not path.startswith(_STDLIB)


@functools.cache
def _described(path: str, line: int, function: str) -> str:
    code = linecache.getline(path, line).strip()
    return f"{Path(path).name}:{line}, in {function}" + (f": {code}" if code else "")

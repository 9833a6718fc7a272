"""How many of a GPU's multiprocessors DeepEP's kernels take, and in what pieces they send.

The library's own number, 20, is for kernels beside others. Alone, with 64 of an H200, a dispatch
takes half the time; more gain little, and could hang: blocks of these kernels wait for other ranks,
as NCCL's do, so all that wait at a time must fit on the GPU beside each other.
"""

import functools
import importlib
from typing import Any

import torch

_OWN = 20
"""What the library starts with; another number was set by somebody, for all of its kernels."""

_ALONE = 64
"""For kernels beside which nothing is computed."""

_OTHERS = 64
"""What they leave to kernels that wait, too: NCCL has at most 32 blocks for a communicator."""

_SEND, _RECEIVE = 12, 128
"""Tokens in a piece, and in the queue of a channel: the fastest of some on four H200s."""


def library() -> Any:
    """The module `deep_ep`, an optional dependency that is loaded when it is first needed."""
    return importlib.import_module("deep_ep")


@torch.compiler.assume_constant_result  # Dynamo runs it while it traces
def num_sms(device: torch.device) -> int:
    """The multiprocessors of a kernel beside which nothing is computed."""
    own: int = library().Buffer.num_sms
    return own if own != _OWN else max(own, min(_ALONE, _multiprocessors(device) - _OTHERS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # an emulation has as many as it likes
        return _ALONE + _OTHERS
    return torch.cuda.get_device_properties(device).multi_processor_count


def configs(sms: int, ranks: int) -> tuple[Any, Any]:
    """The library's configurations of dispatch and combine for that many multiprocessors."""
    return _configs(sms, ranks, library().Buffer.num_sms)


@functools.cache
def _configs(sms: int, ranks: int, own: int) -> tuple[Any, Any]:
    buffer = library().Buffer
    if sms == own:
        return buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
    config = library().Config(sms, _SEND, _RECEIVE, 6, 128)  # the last two are for other machines
    return config, config

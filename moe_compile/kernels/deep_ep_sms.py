"""How many of a GPU's multiprocessors DeepEP's kernels take, and in what pieces they send.

The library's own number, 20, is for kernels beside others. Alone, with 64 of an H200, a dispatch
takes two thirds of the time, and with 96 a little less. All would be too many: blocks of these
kernels wait for other ranks, as NCCL's do, so all that wait at a time must fit on the GPU.
"""

import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist

from moe_compile.kernels.all_to_all import process_group

_OWN = 20
"""What the library starts with; another number was set by somebody, for all of its kernels."""

_ALONE = 96
"""For kernels beside which nothing is computed."""

_NCCL = 32
"""The most blocks that NCCL starts for a communicator."""

_SEND, _RECEIVE = 12, 128
"""Tokens in a piece, and in the queue of a channel: as fast as any on four H200s, and small."""


def library() -> Any:
    """The module `deep_ep`, an optional dependency that is loaded when it is first needed."""
    return importlib.import_module("deep_ep")


@torch.compiler.assume_constant_result  # Dynamo runs it while it traces
def num_sms(device: torch.device, group: str) -> int:
    """The multiprocessors of a kernel beside which nothing is computed.

    FSDP2 may have a second communicator, of replicas, where not all ranks share out the experts.
    """
    own: int = library().Buffer.num_sms
    if own != _OWN:
        return own
    communicators = 1 if process_group(group).size() == dist.get_world_size() else 2
    room = _multiprocessors(device) - communicators * _NCCL
    return max(own, min(_ALONE, room // 2 * 2))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # an emulation has as many as it likes
        return _ALONE + 2 * _NCCL
    return torch.cuda.get_device_properties(device).multi_processor_count


def configs(sms: int, ranks: int) -> tuple[Any, Any]:
    """The library's configurations of dispatch and combine for that many multiprocessors."""
    buffer = library().Buffer
    if sms == buffer.num_sms:
        return buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
    config = library().Config(sms, _SEND, _RECEIVE, 6, 128)  # the last two are for other machines
    return config, config

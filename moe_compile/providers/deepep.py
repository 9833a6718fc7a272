"""Dispatch and combine by DeepEP V1, inside one machine; what it does not take is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.deep_ep import deep_ep_combine, deep_ep_dispatch, library
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.providers.provider import Call
from moe_compile.rewrite.refuse import Refuse

_RANKS = (2, 4, 8)
_MAX_PICKS = 32
_MAX_LOCAL_EXPERTS = 128
_MAX_HIDDEN = 8176
"""Half a row of bfloat16 and a barrier of 8 bytes share 8192 bytes; a wider row traps."""
_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)


def _dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    rows, ids, weights, *handle = deep_ep_dispatch(x, ids, weights, num_experts, group)
    return rows, ids, weights, handle


def _combine(y: Tensor, handle: list[Tensor], num_tokens: int, group: str) -> Tensor:
    return deep_ep_combine(y, None, handle, group)[0]


_IMPLEMENTATIONS: dict[CanonicalOp[..., Any], Callable[..., Any]] = {
    ops.dispatch: _dispatch,
    ops.combine: _combine,
}


@dataclass(frozen=True)
class DeepEPProvider:
    """DeepEP's V1 kernels over NVLink, from the package `deep_ep` where it is installed.

    Two of its ways are left out. `num_worst_tokens`, which never waits for the device, needs a
    bound on the tokens of every rank before they are known, and ranks may bring any number here.
    `ElasticBuffer` (V2) wants that bound when it is made, and equal on all ranks.
    """

    name: str = "deepep"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse what DeepEP would stop at, or trap on, with the limit that it breaks."""
        if op not in _IMPLEMENTATIONS:
            return Refuse(f"deepep does not compute {op.name}")
        if op is ops.combine:
            return None  # of a dispatch that was taken
        arguments = call.arguments(op)
        reason = (
            _installation_problem(arguments["x"].device)
            or _tensor_problem(arguments["x"], arguments["ids"], arguments["weights"])
            or _rank_problem(arguments["num_experts"], call.ep)
        )
        return None if reason is None else Refuse(reason)

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """No model dispatches by itself."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        return _IMPLEMENTATIONS[op]


def _installation_problem(device: torch.device) -> str | None:
    try:
        module = library()
    except Exception as error:  # libraries of another CUDA or NCCL fail in their own ways
        return (
            f"deepep needs the package deep_ep, whose import fails: {error}; install a V1 build "
            "for this CUDA and Python, such as the wheel tokenspeed-deepep==1.2.1.post20251110"
        )
    if not hasattr(module, "Buffer"):
        return (
            "deepep needs deep_ep.Buffer, DeepEP's V1 interface: the installed one is V2 alone, "
            "which takes up to a fixed number of tokens, and here a rank may bring any number"
        )
    kind: str = getattr(module.Buffer, "device_type", "cuda")  # an emulation names its own
    if device.type != kind:
        return f"deepep takes tensors on {kind}: got {device.type}"
    if torch.are_deterministic_algorithms_enabled() and _fills_memory():
        return (
            "deepep stops under deterministic algorithms while memory is filled; set "
            "torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    return _gpu_problem(device) if kind == "cuda" else None


def _fills_memory() -> bool:
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def _gpu_problem(device: torch.device) -> str | None:
    """Its kernels need Hopper's features, and write into the memory of the other GPUs."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"deepep takes GPUs of compute capability 9.0 or newer: got {name}, {capability}"
    others = (i for i in range(torch.cuda.device_count()) if i != device.index)
    joined = all(torch.cuda.can_device_access_peer(device, i) for i in others)
    if "PCIE" in name.upper() or not joined:
        return f"deepep takes GPUs that NVLink joins: got {name}, not all joined to each other"
    return None


def _tensor_problem(x: Tensor, ids: Tensor, weights: Tensor) -> str | None:
    hidden, picks = x.shape[1], ids.shape[1]
    if x.dtype != torch.bfloat16:
        return f"deepep takes bfloat16: got {x.dtype}"
    if weights.dtype not in _WEIGHTS:
        return f"deepep sends weights as float32: got {weights.dtype}"
    if hidden % 16 or hidden > _MAX_HIDDEN:
        return f"deepep takes widths that 16 divides, up to {_MAX_HIDDEN}: got {hidden}"
    if picks > _MAX_PICKS:
        return f"deepep takes up to {_MAX_PICKS} experts for a token: got {picks}"
    return None


def _rank_problem(num_experts: int, ep: ExpertParallel | None) -> str | None:
    size = 1 if ep is None else ep.size
    if size not in _RANKS:
        return f"deepep takes 2, 4 or 8 ranks: got {size}"
    if ep is not None and not ep.one_machine:
        return "deepep takes the ranks of one machine: the EP group spans several"
    if num_experts % size or num_experts // size > _MAX_LOCAL_EXPERTS:
        return (
            f"deepep takes up to {_MAX_LOCAL_EXPERTS} experts a rank, equally many on each: "
            f"got {num_experts} on {size} ranks"
        )
    return None

"""Dispatch and combine by DeepEP, inside one machine; what it does not take is refused."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.deep_ep import deep_ep_combine, deep_ep_dispatch
from moe_compile.kernels.deep_ep_elastic import elastic_combine, elastic_dispatch
from moe_compile.kernels.deep_ep_pairs import DISPATCHER, ELASTIC
from moe_compile.kernels.deep_ep_sms import library, num_sms
from moe_compile.kernels.pairs import implementations
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.providers.provider import Call, Lacks
from moe_compile.rewrite.refuse import Refuse

_MAX_PICKS = 32
_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Interface:
    """One of DeepEP's interfaces, by the class that the library has for it, and its limits."""

    name: str
    implementations: dict[CanonicalOp[..., Any], Callable[..., Any]]
    ranks: tuple[int, ...] | None
    width: int
    max_hidden: int
    max_local_experts: int


def _dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    sms = num_sms(x.device, group)
    # Weights travel in float32. They are cast here, where a compiler sees it.
    sent = deep_ep_dispatch(x, ids, weights.float(), num_experts, group, max_tokens, sms)
    rows, ids, theirs, places, *handle = sent
    # Those without an expert here are zero already, but of rows that did not come.
    return rows, ids, torch.where(ids < 0, 0, theirs).to(weights.dtype), places, handle


def _combine(y: Tensor, handle: list[Tensor], num_tokens: int, group: str) -> Tensor:
    return deep_ep_combine(y, None, handle, group)[0]


def _elastic_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    sent = elastic_dispatch(x, ids, weights, num_experts, group, max_tokens)
    rows, ids, weights, places, *handle = sent
    return rows, ids, weights, places, handle


def _elastic_combine(y: Tensor, handle: list[Tensor], num_tokens: int, group: str) -> Tensor:
    return elastic_combine(y, None, handle, group)[0]


V1 = Interface(
    "Buffer",
    {ops.dispatch: _dispatch, ops.combine: _combine, **implementations(DISPATCHER)},
    ranks=(2, 4, 8),
    width=16,
    # Half a row of bfloat16 and a barrier of 8 bytes share 8192 bytes; a wider row traps.
    max_hidden=8176,
    max_local_experts=128,
)
V2 = Interface(
    "ElasticBuffer",
    {
        ops.dispatch: _elastic_dispatch,
        ops.combine: _elastic_combine,
        **implementations(ELASTIC),
    },
    ranks=None,
    # Each of the 32 threads of a warp sums 8 numbers at a time.
    width=256,
    # Some rows, with their picks, must fit into the shared memory of a multiprocessor.
    max_hidden=32768,
    max_local_experts=256,
)


def interface(module: Any) -> Interface | None:
    """The interface of DeepEP that is used: V1 where it is there, by attribute."""
    return next((found for found in (V1, V2) if hasattr(module, found.name)), None)


@dataclass(frozen=True)
class DeepEPProvider:
    """DeepEP's kernels over NVLink, from the package `deep_ep` where it is installed.

    Dispatch waits for the device, unless `OptimizeConfig.max_tokens_per_rank` bounds the tokens.
    """

    name: str = "deepep"
    package: str | None = "deep_ep"

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        """Refuse what DeepEP would stop at, or trap on, with the limit that it breaks."""
        if op not in V1.implementations:
            return Lacks(f"deepep does not compute {op.name}")
        if op not in ops.SENDS:
            return None  # of a dispatch that was taken
        reason = _problem(call, call.arguments(op))
        return None if reason is None else Refuse(reason)

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        """No model dispatches by itself."""
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        """The implementation of `op`."""
        found = interface(library())
        assert found is not None, "supports() refuses a library without buffers"
        return found.implementations[op]


def _problem(call: Call, arguments: dict[str, Any]) -> str | None:
    try:
        module = library()
    except Exception as error:  # libraries of another CUDA or NCCL fail in their own ways
        return (
            f"deepep needs the package deep_ep, whose import fails: {error}; install a build "
            "for this CUDA and Python, such as the wheel tokenspeed-deepep==1.2.1.post20251110"
        )
    found = interface(module)
    if found is None:
        return "deepep needs deep_ep.Buffer (V1) or deep_ep.ElasticBuffer (V2): found neither"
    return (
        _device_problem(module, found, arguments["x"].device)
        or _tensor_problem(found, arguments["x"], arguments["ids"], arguments["weights"])
        or _rank_problem(found, arguments["num_experts"], call.ep)
    )


def _device_problem(module: Any, found: Interface, device: torch.device) -> str | None:
    # An emulation names its own kind of device.
    kind: str = getattr(getattr(module, found.name), "device_type", "cuda")
    if device.type != kind:
        return f"deepep takes tensors on {kind}: got {device.type}"
    is_strict = torch.are_deterministic_algorithms_enabled()
    if is_strict and found is V2:
        return "deepep V2 places rows by atomic additions, and may sum a token's in any order"
    if is_strict and _fills_memory():
        return (
            "deepep stops under deterministic algorithms while memory is filled; set "
            "torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    if kind != "cuda":
        return None
    return _gpu_problem(device) or (_compiler_problem(module) if found is V2 else None)


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


def _compiler_problem(module: Any) -> str | None:
    """V2 compiles its kernels when they are first used, which is too late to refuse."""
    nvcc = os.environ.get("EP_JIT_NVCC_COMPILER") or f"{module.find_cuda_home()}/bin/nvcc"
    if Path(nvcc).exists():
        return None
    return f"deepep V2 compiles its kernels with nvcc: found none at {nvcc}; set CUDA_HOME"


def _tensor_problem(found: Interface, x: Tensor, ids: Tensor, weights: Tensor) -> str | None:
    hidden, picks = x.shape[1], ids.shape[1]
    if x.dtype != torch.bfloat16:
        return f"deepep takes bfloat16: got {x.dtype}"
    if weights.dtype not in _WEIGHTS:
        return f"deepep sends weights as float32: got {weights.dtype}"
    if hidden % found.width or hidden > found.max_hidden:
        return (
            f"deepep takes widths that {found.width} divides, up to {found.max_hidden}: "
            f"got {hidden}"
        )
    if picks > _MAX_PICKS:
        return f"deepep takes up to {_MAX_PICKS} experts for a token: got {picks}"
    return None


def _rank_problem(found: Interface, num_experts: int, ep: ExpertParallel | None) -> str | None:
    size = 1 if ep is None else ep.size
    if found.ranks is not None and size not in found.ranks:
        return f"deepep takes 2, 4 or 8 ranks: got {size}"
    if size == 1:
        return "deepep takes 2 ranks or more: got 1"
    if ep is not None and not ep.one_machine:
        return "deepep takes the ranks of one machine: the EP group spans several"
    if num_experts % size or num_experts // size > found.max_local_experts:
        return (
            f"deepep takes up to {found.max_local_experts} experts a rank, equally many on each: "
            f"got {num_experts} on {size} ranks"
        )
    return None

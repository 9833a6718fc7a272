"""What a timing holds for beside the call: the device and the code that ran on it."""

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from moe_compile.providers.provider import Provider

_FOLDERS = ("kernels", "ops", "providers")


def device_name(device: torch.device) -> str:
    """The device's model; of a CPU also what torch makes of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    use = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{platform.machine()} {platform.processor()} on {platform.node()}, {use}"


def versions() -> str:
    """Of torch, triton, and this library: of the latter a hash, as a checkout has no version."""
    return f"torch {torch.__version__}, triton {version_of('triton')}, moe_compile {_own_code()}"


def named(provider: Provider) -> str:
    """A provider with the version of its package."""
    if provider.package is None:
        return provider.name
    return f"{provider.name} {version_of(provider.package)}"


@functools.cache
def version_of(package: str) -> str:
    """The version of an installed distribution; `none` if it is not one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _own_code() -> str:
    root = Path(__file__).parents[1]
    files = sorted(file for folder in _FOLDERS for file in root.joinpath(folder).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]

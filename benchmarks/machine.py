"""What a benchmark says of the machine that it ran on."""

import platform
import sys
from pathlib import Path

import torch
import transformers


def describe() -> str:
    """Versions, processor and command: two lines above every table."""
    cores = f"{torch.get_num_threads()} of {torch.multiprocessing.cpu_count()} cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    command = " ".join(["python", *map(_relative, sys.argv)])
    return f"{_cpu()}, {cores}{_gpu()}; {versions}\n{command}\n"


def _relative(argument: str) -> str:
    path = Path(argument)
    return str(path.resolve().relative_to(Path.cwd())) if path.suffix == ".py" else argument


def _cpu() -> str:
    """The processor's name, with the vector instructions that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _gpu() -> str:
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )

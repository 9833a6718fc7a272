"""What a training step on one GPU compiles, waits for and keeps, beside transformers.

python benchmarks/whole_step.py                    # 48 layers, each peer in a process of its own
python benchmarks/whole_step.py moe_compile --layers 4 --experts 128

Qwen3-30B-A3B's widths with fewer experts, so that all layers fit beside their gradients; peers are
those of one_gpu.py. `first step` is the first forward and backward, compilation included, with
empty caches; `graphs` is what Dynamo compiled. `waits` are the places in a later forward and
backward where the host waits for the device, as torch's synchronisation debugger sees them; they
are listed below the table. `kept` is what one layer's forward leaves in memory for the backward,
for a token: the median layer.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import one_gpu
import torch
from machine import describe, markdown
from torch import Tensor, nn
from torch._dynamo.utils import counters

PEERS = ("hf", "hf_compile", "moe_compile")


def step(peer: str, model: Any, ids: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    one_gpu.loss_of(peer, model, ids).backward()


def waits(peer: str, model: Any, ids: Tensor) -> Counter[str]:
    """How often each line made the host wait in a step."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(peer, model, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    )


def kept(peer: str, model: Any, ids: Tensor) -> float:
    """Bytes for each token that the median layer's forward leaves allocated."""
    before, after = list[int](), list[int]()

    def note(sizes: list[int]) -> Any:
        return lambda *_: sizes.append(torch.cuda.memory_allocated())

    layers: nn.ModuleList = model.model.layers
    hooks = [layer.register_forward_pre_hook(note(before)) for layer in layers]
    hooks += [layer.register_forward_hook(note(after)) for layer in layers]
    step(peer, model, ids)
    for hook in hooks:
        hook.remove()
    sizes = [end - start for start, end in zip(before, after, strict=True)]
    return statistics.median(sizes) / ids.numel()


def measure(args: argparse.Namespace) -> tuple[str, ...]:
    """One peer's row, and what it waited for."""
    peer = args.peers[0]
    model = one_gpu.build(peer, args.layers, args.experts)
    ids = torch.randint(one_gpu.VOCABULARY, (args.batch, args.length), device="cuda")
    counters.clear()
    start = time.perf_counter()
    step(peer, model, ids)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    graphs = counters["stats"]["unique_graphs"]
    step(peer, model, ids)
    found = waits(peer, model, ids)
    size = kept(peer, model, ids) / 2**10
    places = ", ".join(f"{place} ({count})" for place, count in found.items()) or "-"
    cells = f"{first:.1f} s", str(graphs), str(found.total()), f"{size:.1f} KiB"
    return peer, *cells, places


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", default=list(PEERS))
    sizes = {"layers": 48, "experts": 16, "batch": 1, "length": 4096}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--one", action="store_true", help="measure the one peer named, here")
    args = parser.parse_args()
    if args.one:
        print("\t".join(measure(args)))
        return
    rows: list[tuple[str, ...]] = []
    for peer in args.peers:
        options = [f"--{name}={getattr(args, name)}" for name in sizes]
        with tempfile.TemporaryDirectory() as cache:
            fresh = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            done = subprocess.run(
                [sys.executable, __file__, peer, "--one", *options],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | fresh,
            )
        if done.returncode:
            print(f"{peer} did not run: see above")
        else:
            rows.append(tuple(done.stdout.strip().splitlines()[-1].split("\t")))
    print(describe())
    print(f"{args.layers} layers, {args.experts} experts, {args.batch} x {args.length} tokens\n")
    header = ("peer", "first step", "graphs", "waits", "kept a token and layer")
    print(markdown(header, [row[:-1] for row in rows]))
    for row in rows:
        print(f"{row[0]} waits at: {row[-1]}")


if __name__ == "__main__":
    main()

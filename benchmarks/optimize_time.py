"""How long `optimize` takes on Qwen3-30B-A3B at full size, on meta tensors, and what passes do.

python benchmarks/optimize_time.py
python benchmarks/optimize_time.py --depths 12 24 48 96 --repeat 3

Every measurement has a process of its own. The times are the fastest of `--repeat`, without imports
and without building the model; `CPU` is the process's own time, which other programs do not change.
The memory is the whole process's peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from machine import describe, markdown
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import moe_compile
from moe_compile.capture.group import group
from moe_compile.capture.probe import probe
from moe_compile.capture.shadow import cast_shadow
from moe_compile.optimize import run_passes
from moe_compile.rewrite.unit_graph import UnitGraph

FULL_DEPTH = 48


def build(layers: int) -> PreTrainedModel:
    """Qwen3-30B-A3B with another depth, in bfloat16, without storage."""
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    config.head_dim = 128
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def measure(layers: int) -> dict[str, Any]:
    """One `optimize`, in this process."""
    model = build(layers)
    start, used = time.perf_counter(), time.process_time()
    moe_compile.optimize(model)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    report = moe_compile.report(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {
        "layers": layers,
        "seconds": seconds,
        "cpu": used,
        "steps": report.seconds,
        "captures": report.captures,
        "rewritten": sum(site.layers for site in report.sites if site.status == "rewritten"),
        "peak": peak / 2**30,
    }


def measured(layers: int, repeat: int) -> dict[str, Any]:
    """The fastest of several processes."""
    command = [sys.executable, __file__, "--one", str(layers)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeat)]
    return min(runs, key=lambda run: run["cpu"])


def depth_table(depths: list[int], repeat: int) -> str:
    """Seconds, memory and captures at every depth, and what a layer adds."""
    runs = [measured(layers, repeat) for layers in depths]
    rows = [
        (
            str(run["layers"]),
            f"{run['seconds']:.1f} s",
            f"{run['cpu']:.1f} s",
            f"{run['peak']:.2f} GiB",
            str(run["captures"]),
            str(run["rewritten"]),
            ", ".join(f"{name} {value:.1f}" for name, value in run["steps"].items()),
        )
        for run in runs
    ]
    header = ("layers", "optimize", "CPU", "peak memory", "captures", "rewritten", "seconds")
    added = runs[-1]["cpu"] - runs[0]["cpu"], runs[-1]["layers"] - runs[0]["layers"]
    slope = f"{added[0] / added[1] * 1e3:.0f}" if added[1] else "-"
    return f"{markdown(header, rows)}\n\nCPU time of an added layer: {slope} ms"


def pass_table() -> str:
    """Nodes and canonical ops of one decoder layer's training capture, around every pass."""
    shadow = cast_shadow(build(FULL_DEPTH))
    groups = group(shadow, probe(shadow, None).calls)
    layer = next(found for found in groups if len(found.names) == FULL_DEPTH)
    assert layer.capture is not None
    unit = UnitGraph.of(layer.names[0], layer.capture, {})
    run_passes(moe_compile.PIPELINE, unit)
    rows: list[tuple[str, ...]] = []
    ops: dict[str, int] = {}
    for record in unit.records:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(record.ops.items()))
        rows.append(
            (
                record.name,
                str(record.changed),
                str(record.nodes_before),
                str(record.nodes_after),
                str(sum(ops.values())),
                str(sum(record.ops.values())),
                counts or "-",
            )
        )
        ops = record.ops
    header = ("pass", "changes", "nodes before", "after", "ops before", "after", "canonical ops")
    return markdown(header, rows)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    print(describe())
    print(depth_table(args.depths, args.repeat), end="\n\n", flush=True)
    print(pass_table())


if __name__ == "__main__":
    main()

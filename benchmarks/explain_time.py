"""How long `explain` takes on every family at its real size, on the meta device.

python benchmarks/explain_time.py
python benchmarks/explain_time.py qwen3_moe mixtral --timeout 300

The configuration is the default one of the family's class, which for most is that of a published
model. Every family has a process of its own. Seconds are without imports and without building the
model; the memory is the whole process's peak.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe, markdown

import moe_compile
from moe_compile.report import Report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.zoo.entries import entries, entry_of, full_size  # noqa: E402
from tests.zoo.shrink import sub_configs  # noqa: E402

Row = dict[str, Any]
HEADER = (
    "family",
    "layers",
    "parameters",
    "explain",
    "CPU",
    "peak memory",
    "experts",
    "captures",
    "seconds",
)
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "decoder_layers")


def measure(name: str) -> Row:
    """One `explain`, in this process."""
    with torch.device("meta"):
        model = full_size(entry_of(name))
    start, used = time.perf_counter(), time.process_time()
    report = moe_compile.explain(model)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "layers": depth(model.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "explain": seconds,
        "cpu": used,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        "experts": experts(report),
        "captures": report.captures,
        "steps": report.seconds,
    }


def experts(report: Report) -> str:
    """How many layers have their experts rewritten, of how many."""
    sites = [site for site in report.sites if site.kind == "experts"]
    done = sum(site.layers for site in sites if site.status == "rewritten")
    return f"{done} of {sum(site.layers for site in sites)}"


def depth(config: Any) -> int:
    """The layers of the deepest part."""
    known = (getattr(config, name, None) for name in _DEPTHS)
    own = next((count for count in known if isinstance(count, int)), 0)
    return max([own, *map(depth, sub_configs(config).values())])


def measured(name: str, timeout: float) -> Row:
    """The same in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {timeout:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:100]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(name: str, row: Row) -> tuple[str, ...]:
    """One row of the table."""
    if "failed" in row:
        return (name, *["-"] * (len(HEADER) - 2), row["failed"])
    return (
        name,
        str(row["layers"]),
        f"{row['parameters'] / 1e9:.1f} B",
        f"{row['explain']:.1f} s",
        f"{row['cpu']:.1f} s",
        f"{row['peak']:.2f} GiB",
        row["experts"],
        str(row["captures"]),
        ", ".join(f"{step} {value:.1f}" for step, value in row["steps"].items()),
    )


def main() -> None:
    """Prints the table, and below it the median and the largest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all of them by default")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one family")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows: dict[str, Row] = {}
    for name in arguments.names or [entry.name for entry in entries()]:
        rows[name] = measured(name, arguments.timeout)
        print(*line(name, rows[name]), sep="  ", file=sys.stderr, flush=True)
    print(describe())
    print(markdown(HEADER, [line(name, row) for name, row in rows.items()]), end="\n\n")
    fine = [row for row in rows.values() if "failed" not in row]
    if fine:
        seconds, peaks = [row["explain"] for row in fine], [row["peak"] for row in fine]
        print(
            f"{len(fine)} of {len(rows)} families: median {statistics.median(seconds):.1f} s, "
            f"longest {max(seconds):.1f} s, largest peak {max(peaks):.2f} GiB"
        )


if __name__ == "__main__":
    main()

"""What `explain` says of a small random model of every family, each in a process of its own.

python benchmarks/zoo_survey.py --parity --json survey.json mixtral gpt_oss

Without names, every family. A line has the seconds, the sites counted by kind and status, and why
experts were refused. `--parity` optimizes the model too, and compares the loss and every gradient
of a training call with those of an untouched copy: the largest relative L2 error.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import moe_compile
from moe_compile.report import Report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.zoo.entries import Entry, build, entries, entry_of  # noqa: E402
from tests.zoo.inputs import call_of  # noqa: E402
from tests.zoo.steps import step, worst_of  # noqa: E402

Row = dict[str, Any]
REASON = 160
"""Characters of a reason that are printed."""


def main() -> None:
    """Prints a line for every family."""
    arguments = _arguments()
    if arguments.one:
        print(json.dumps(survey(entry_of(arguments.one), parity=arguments.parity)))
        return
    names = arguments.names or [entry.name for entry in entries()]
    rows: list[Row] = []
    for name in names:
        rows.append(_in_a_process(name, arguments.parity, arguments.timeout))
        print(line(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))


def survey(entry: Entry, *, parity: bool) -> Row:
    """The sites of one family, or how it failed."""
    row: Row = {"entry": entry.name}
    stage = "build"
    try:
        model = build(entry)
        stage = "explain"
        row |= _explained(moe_compile.explain(model))
        if parity:
            stage = "parity"
            row |= {"parity": _parity(entry, model)}
    except Exception as failure:
        row |= {"failed": f"{stage}: {type(failure).__name__}: {failure}", "trace": _trace()}
    return row


def line(row: Row) -> str:
    """One family, for reading."""
    counts = ", ".join(f"{n} {what}" for what, n in sorted(row.get("counts", {}).items()))
    parts = [f"{row['entry']:24} {row.get('seconds', 0):6.1f} s  {counts}"]
    if "parity" in row:
        worst, name = row["parity"]
        parts.append(f"parity: {worst:.1e} ({name})")
    parts += [f"refused: {reason[:REASON]}" for reason in row.get("reasons", [])]
    parts += [f"FAILED in {' '.join(row['failed'].split())[:300]}"] if "failed" in row else []
    return "\n    ".join(parts)


def _explained(report: Report) -> Row:
    counts = Counter[str]()
    for site in report.sites:
        counts[f"{site.kind} {site.status}"] += site.layers
    refused = [s for s in report.sites if s.kind == "experts" and s.status == "refused"]
    return {
        "counts": dict(counts),
        "reasons": sorted({f"{s.pattern}: {s.reason}" for s in refused}),
        "sites": report.to_json()["sites"],
    }


def _parity(entry: Entry, model: Any) -> tuple[float, str]:
    """The largest error of the loss and the gradients of one step, with its name."""
    original, call = copy.deepcopy(model), call_of(entry)
    return worst_of(step(moe_compile.optimize(model), call), step(original, call))


def _in_a_process(name: str, parity: bool, timeout: float) -> Row:
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command + ["--parity"] * parity, capture_output=True, text=True, timeout=timeout
        )
        last = done.stdout.strip().splitlines()[-1:]
        row = json.loads(last[0]) if last else {"failed": f"process: {done.stderr[-400:]}"}
    except subprocess.TimeoutExpired:
        row = {"failed": f"time: more than {timeout:.0f} s"}
    return {"entry": name, "seconds": time.perf_counter() - start} | row


def _trace() -> list[str]:
    """The last frames of the exception."""
    return traceback.format_exc().splitlines()[-40:]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all of them by default")
    parser.add_argument("--parity", action="store_true", help="optimize and compare one step")
    parser.add_argument("--json", type=Path, help="write all sites to this file")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one family")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Write docs/families.md: what `explain` finds in a small random model of every family.

python benchmarks/families_table.py --ep
python benchmarks/families_table.py mixtral gpt_oss --ep --output table.md

Every family has a process of its own. `--ep` also takes a training step on two ranks and compares
the loss and every gradient with one process. The counts are printed for the README.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import describe, markdown
from torch import fx

import moe_compile
from moe_compile import PIPELINE, Pass
from moe_compile.ops import experts
from moe_compile.report import Report, Site
from moe_compile.rewrite.region import Region
from moe_compile.rewrite.unit_graph import UnitGraph

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.ranks import on_ranks  # noqa: E402
from tests.zoo.entries import build, entries, entry_of  # noqa: E402
from tests.zoo.expert_parallel import worst_error  # noqa: E402

Row = dict[str, Any]
HEADER = (
    "family",
    "experts",
    "storage",
    "router",
    "norms",
    "attention",
    "EP=2",
    "nodes",
    "seconds",
)
TOLERANCE = 1e-5
CUT = 140
"""Characters of a reason."""
LEGEND = """\
What `explain` finds in a small random model of each family of transformers that mixes experts. Numbers count
modules; a pattern's name stands for what it rewrote. *Storage* is how the experts' weights lie: one stack (as
`[out, in]`, or transposed), a flat matrix, or a module for each expert. *EP=2* is a training step on two ranks, over
gloo: `yes` where experts are spread and the loss and every gradient are those of one process, `not spread` where
they are, but every rank holds some or all of the experts whole, `fails by itself` where the release's own step
raises. *Nodes* are those of all captures before and after
the passes, *seconds* those of `explain`."""  # noqa: E501
_aten = torch.ops.aten


@dataclass(frozen=True)
class NoteStorage(Pass):
    """Read-only: how the experts' weights are stored that the passes before it have found."""

    name = "note_storage"
    found: dict[str, None] = field(default_factory=dict[str, None])

    def run(self, unit: UnitGraph) -> int:
        """Notes every canonical op of experts."""
        for node in unit.graph.nodes:
            if node.target is experts:
                self.found[storage(node)] = None
        return 0


def storage(node: fx.Node) -> str:
    """Stacked, transposed, flat, or a module each; and whether gate and up are interleaved."""
    arguments = experts.arguments(*node.args, **node.kwargs)
    targets = _above(arguments["up"])
    kind = "transposed" if arguments["transposed"] else "stacked"
    if _aten.reshape.default in targets:
        kind = "flat"
    if _aten.stack.default in targets:
        kind = "modules"
    return f"{kind}, interleaved" if _interleaves(arguments["activation"]) else kind


def _above(node: fx.Node) -> set[Any]:
    """What is computed on the way from the parameters to a weight."""
    if node.op != "call_function":
        return set()
    return {node.target}.union(*map(_above, node.all_input_nodes))


def _interleaves(activation: Region) -> bool:
    slices = [n for n in activation.graph.nodes if n.target is _aten.slice.Tensor]
    return any(node.args[4:] == (2,) for node in slices)


def survey(name: str) -> Row:
    """What is found in one family."""
    noted = NoteStorage()
    model = build(entry_of(name))
    start = time.perf_counter()
    report = moe_compile.explain(model, passes=PIPELINE.after("raise_experts", noted))
    seconds = time.perf_counter() - start
    return {
        "sites": report.to_json()["sites"],
        "storage": list(noted.found),
        "nodes": nodes(report),
        "seconds": seconds,
    }


def nodes(report: Report) -> tuple[int, int]:
    """Of all captures, before the first pass and after the last."""
    return report.passes[0].nodes_before, report.passes[-1].nodes_after


def parity(name: str) -> Row:
    """The step on two ranks."""
    if entry_of(name).broken:
        return {"ep": "fails by itself"}
    try:
        answers = on_ranks(2, worst_error, name)
    except AssertionError as failure:
        lines = [line for line in str(failure).splitlines() if line.strip()]
        # A `ValueError` is the library's answer to what it does not take.
        status = "refused" if lines[-1].startswith("ValueError") else "error"
        return {"ep": status, "ep_reason": lines[-1].strip()}
    wrong, where, spread = max(answers)
    if wrong < TOLERANCE:
        return {"ep": "yes" if spread else "not spread"}
    return {"ep": "error", "ep_reason": f"a relative error of {wrong:.1e} in {where}"}


def line(name: str, row: Row) -> tuple[str, ...]:
    """One row of the table."""
    sites = [Site(**site) for site in row.get("sites", [])]
    of = {kind: [site for site in sites if site.kind == kind] for kind in {s.kind for s in sites}}
    before, after = row.get("nodes", ("-", "-"))
    return (
        name,
        "failed" if "failed" in row else cell(of.get("experts", [])),
        "; ".join(row.get("storage", [])) or "-",
        cell(of.get("router", []), names=False),
        cell(of.get("rms_norm", []), names=False),
        cell([*of.get("rope", []), *of.get("attention", [])]),
        row.get("ep", "not run"),
        f"{before} -> {after}",
        f"{row['seconds']:.1f}" if "seconds" in row else "-",
    )


def cell(sites: list[Site], *, names: bool = True) -> str:
    """How many modules; a pattern's name says that they are rewritten, where nothing else is."""
    counts = Counter[str]()
    for site in sites:
        pattern = f"{site.pattern} " if names and site.status != "refused" and site.pattern else ""
        status = "" if pattern and site.status == "rewritten" else f"{site.status} "
        counts[(pattern + status).strip()] += site.layers
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "-"


def reasons(name: str, row: Row) -> list[str]:
    """Why experts are refused, a rank's step differs or the family failed, a line each."""
    refused = {
        f"experts: {site['reason']}"
        for site in row.get("sites", [])
        if site["kind"] == "experts" and site["status"] == "refused"
    }
    found = sorted(refused)
    found += [f"EP=2: {row['ep_reason']}"] if "ep_reason" in row else []
    found += [f"failed: {row['failed']}"] if "failed" in row else []
    return [f"* **{name}**, {' '.join(reason.split())[:CUT]}" for reason in found]


def summary(rows: dict[str, Row]) -> str:
    """The counts, in a sentence."""
    statuses = [
        {s["status"] for s in r.get("sites", []) if s["kind"] == "experts"} for r in rows.values()
    ]
    whole = sum(found == {"rewritten"} for found in statuses)
    partly = sum("rewritten" in found and len(found) > 1 for found in statuses)
    ran = [row["ep"] for row in rows.values() if "ep" in row]
    text = f"Of {len(rows)} families, {whole} have all of their experts rewritten and {partly} some"
    if ran:
        equal, spread = sum(ep in ("yes", "not spread") for ep in ran), ran.count("yes")
        text += f"; on two ranks, {equal} of {len(ran)} give the loss and every gradient of one "
        text += f"process, {spread} of them with all experts spread"
    return f"{text}."


def page(rows: dict[str, Row]) -> str:
    """docs/families.md."""
    why = [text for name, row in rows.items() for text in reasons(name, row)]
    parts = [
        "# Families",
        f"Written by this command, not by hand:\n\n```text\n{describe()}```",
        summary(rows),
        LEGEND,
        markdown(HEADER, [line(name, row) for name, row in rows.items()]),
    ]
    if why:
        parts += ["## What is not rewritten, and why", "\n".join(why)]
    return "\n\n".join(parts) + "\n"


def measured(name: str, ep: bool, timeout: float) -> Row:
    """A family in processes of its own: a step that dies or hangs takes no other with it."""
    row = _in_a_process(name, "survey", timeout)
    return row | (_in_a_process(name, "parity", timeout) if ep and "failed" not in row else {})


def _in_a_process(name: str, what: str, timeout: float) -> Row:
    command = [sys.executable, "-W", "ignore", __file__, name, "--only", what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return _failure(what, f"more than {timeout:.0f} s")
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        return _failure(what, (done.stderr.strip().splitlines() or ["nothing was printed"])[-1])
    return json.loads(last[0])


def _failure(what: str, reason: str) -> Row:
    return {"ep": "error", "ep_reason": reason} if what == "parity" else {"failed": reason}


def main() -> None:
    """Writes the page, after every family; prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all of them by default")
    parser.add_argument("--ep", action="store_true", help="compare a step on two ranks, too")
    parser.add_argument("--jobs", type=int, default=1, help="families at once")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one process")
    parser.add_argument("--only", choices=("survey", "parity"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        (name,) = arguments.names
        print(json.dumps(survey(name) if arguments.only == "survey" else parity(name)))
        return
    names = arguments.names or sorted(entry.name for entry in entries())
    rows: dict[str, Row] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda name: measured(name, arguments.ep, arguments.timeout), names)
        for name, row in zip(names, found, strict=True):
            rows[name] = row
            arguments.output.write_text(page(rows), encoding="utf-8")
            print(*line(name, row), *reasons(name, row), sep=" | ", flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()

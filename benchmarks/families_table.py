"""Print the README's table of families: what `explain` finds in a small random model of each.

python benchmarks/families_table.py

A cell counts the modules that each pattern was found in; they are rewritten unless it says
otherwise.
"""

import sys
from collections import Counter
from pathlib import Path

import torch

import moe_compile
from moe_compile.report import Site

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES, build  # noqa: E402

COLUMNS = {
    "experts": ("experts",),
    "norms": ("rms_norm",),
    "attention": ("attention", "rope"),
    "router": ("router",),
    "dense MLP": ("mlp",),
}


def cell(sites: list[Site]) -> str:
    """How many modules each pattern covers; `kept` and `refused` are said, `rewritten` is not."""
    counts = Counter[str]()
    for site in sites:
        status = "" if site.status == "rewritten" else f" ({site.status})"
        counts[f"{site.pattern or 'none'}{status}"] += site.layers
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "-"


def main() -> None:
    """Prints the table."""
    print("| family |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for family in FAMILIES:
        sites = moe_compile.explain(build(family, torch.bfloat16)).sites
        columns = [[s for s in sites if s.kind in kinds] for kinds in COLUMNS.values()]
        print(f"| {family} |", " | ".join(map(cell, columns)), "|", flush=True)


if __name__ == "__main__":
    main()

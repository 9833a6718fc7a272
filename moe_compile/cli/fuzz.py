"""`moe-compile fuzz`: judge random mixture-of-experts blocks."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compile.fuzz.campaign import Tally

_DESCRIPTION = """
Draws random blocks, writes them as ordinary PyTorch modules, optimizes each and compares outputs
and gradients with the untouched block. The status is 1 if any is wrong, silent or crashed, or if
fewer of the supported are proven than --share says.
"""


def add(commands: Any) -> None:
    """Declares the subcommand."""
    parser = commands.add_parser("fuzz", help="judge random blocks", description=_DESCRIPTION)
    parser.add_argument("--blocks", type=int, default=200, help="how many to judge")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--show", type=int, default=5, help="failures of which to print the source")
    parser.add_argument("--share", type=float, default=98.0, help="least percentage proven")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CHOICE=VALUE",
        help="judge blocks with this choice, such as loop=where; may be repeated",
    )
    parser.add_argument("--block", type=int, help="judge one block, by its seed, and print it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; returns its exit status."""
    import torch

    torch.set_num_threads(1)  # the blocks are tiny
    return _one(arguments.block) if arguments.block is not None else _many(arguments)


def _one(seed: int) -> int:
    from moe_compile.fuzz.campaign import describe
    from moe_compile.fuzz.judge import FAILURES, judge_seed

    verdict = judge_seed(seed)
    print(describe(verdict))
    return int(verdict.outcome in FAILURES)


def _many(arguments: argparse.Namespace) -> int:
    from moe_compile.fuzz.campaign import Tally, describe, verdicts
    from moe_compile.fuzz.draw import select

    tally, start = Tally(), time.perf_counter()
    only = dict(choice.split("=", 1) for choice in arguments.only)
    try:
        seeds = select(arguments.seed, arguments.blocks, only)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    for verdict in verdicts(seeds, arguments.jobs):
        tally.add(verdict)
        _progress(tally, arguments.blocks)
    for verdict in tally.failures[: arguments.show]:
        print(describe(verdict), end="\n\n")
    print(tally.table())
    print(f"{arguments.blocks} blocks in {time.perf_counter() - start:.0f} s")
    for verdict in tally.failures:
        print(f"{verdict.outcome}: block {verdict.spec.seed}")
    return int(bool(tally.failures) or tally.proven_share < arguments.share)


def _progress(tally: "Tally", blocks: int) -> None:
    """One line that a terminal overwrites; in a log, one line for every twentieth part."""
    count = len(tally.verdicts)
    text = f"{count} of {blocks}: {tally.line()}"
    if sys.stderr.isatty():
        end = "\n" if count == blocks else ""
        print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
    elif count % max(blocks // 20, 1) == 0:
        print(text, file=sys.stderr, flush=True)

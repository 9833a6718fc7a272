"""Judges many blocks, in several processes, and counts."""

import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch

from moe_compile.fuzz.judge import FAILURES, OUTCOMES, Outcome, Verdict, judge_seed
from moe_compile.fuzz.source import source
from moe_compile.fuzz.spec import unsupported

_WIDTH = 110


def verdicts(seeds: Iterable[int], jobs: int = 1) -> Iterator[Verdict]:
    """The verdict of every seed, in order."""
    if jobs == 1:
        yield from map(judge_seed, seeds)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    with ProcessPoolExecutor(jobs, context, _single_thread) as pool:
        yield from pool.map(judge_seed, seeds)


def _single_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Tally:
    """The verdicts of a campaign."""

    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    _counts: Counter[Outcome] = field(default_factory=Counter[Outcome])

    def add(self, verdict: Verdict) -> None:
        """Counts one more."""
        self.verdicts.append(verdict)
        self._counts[verdict.outcome] += 1

    @property
    def failures(self) -> list[Verdict]:
        """Those that must not be: wrong, silent and crashed."""
        return [v for v in self.verdicts if v.outcome in FAILURES]

    @property
    def proven_share(self) -> float:
        """The percentage of supported blocks that were proven."""
        supported = self._of(supported=True)
        proven = [v for v in supported if v.outcome == "proven"]
        return 100.0 * len(proven) / len(supported) if supported else 100.0

    def line(self) -> str:
        """The counts, on one line; after every block, so nothing is counted again."""
        return ", ".join(f"{self._counts[outcome]} {outcome}" for outcome in OUTCOMES)

    def table(self) -> str:
        """Counts by outcome, shares, seconds and the reasons of refusals."""
        lines = [f"{'':12}{'supported':>12}{'others':>12}"]
        supported, others = self._of(supported=True), self._of(supported=False)
        for outcome in OUTCOMES:
            counts = (sum(v.outcome == outcome for v in part) for part in (supported, others))
            lines.append(f"{outcome:12}" + "".join(f"{count:12}" for count in counts))
        lines.append(f"proven of the supported: {self.proven_share:.1f} %")
        return "\n".join([*lines, *self._seconds(), *self._by_loop(), *self._reasons()])

    def _of(self, *, supported: bool) -> list[Verdict]:
        return [v for v in self.verdicts if (unsupported(v.spec) is None) == supported]

    def _seconds(self) -> list[str]:
        if not self.verdicts:
            return []
        steps: dict[str, float] = defaultdict(float)
        for name, seconds in (step for v in self.verdicts for step in v.steps.items()):
            steps[name] += seconds
        total = sum(v.seconds for v in self.verdicts)
        steps["comparison"] = total - sum(steps.values())
        slowest = max(self.verdicts, key=lambda v: v.seconds)
        parts = ", ".join(
            f"{n} {s / len(self.verdicts):.2f}" for n, s in steps.items() if s >= 0.01
        )
        return [
            f"seconds a block: {total / len(self.verdicts):.2f} ({parts}); "
            f"the slowest is {slowest.spec.seed} with {slowest.seconds:.1f}"
        ]

    def _by_loop(self) -> list[str]:
        """How many of each loop's supported blocks were proven."""
        proven, all_blocks = Counter[str](), Counter[str]()
        for verdict in self._of(supported=True):
            all_blocks[verdict.spec.loop] += 1
            proven[verdict.spec.loop] += verdict.outcome == "proven"
        return [f"  {n:16}{proven[n]:5} of {all_blocks[n]:5} proven" for n in sorted(all_blocks)]

    def _reasons(self) -> list[str]:
        lines: list[str] = []
        for title, chosen in (("supported", True), ("others", False)):
            refused = [v for v in self._of(supported=chosen) if v.outcome == "refused"]
            counts = Counter(_general(v.reason) for v in refused)
            lines += [f"refused, {title}:"] if counts else []
            lines += [f"{count:6}  {reason}" for reason, count in counts.most_common()]
        return lines


def _general(reason: str) -> str:
    """A reason without the numbers that differ from block to block."""
    plain = re.sub(r"[-+]?\d[\d.e+-]*", "#", reason.splitlines()[0])
    return plain if len(plain) <= _WIDTH else f"{plain[: _WIDTH - 3]}..."


def describe(verdict: Verdict) -> str:
    """A block for people: what it is, its source, and the verdict."""
    spec = verdict.spec
    head = f"block {spec.seed}: {verdict.outcome}: {verdict.reason or 'by the oracle'}"
    again = f"again: moe-compile fuzz --block {spec.seed}"
    return "\n".join([head, again, str(spec), "", source(spec)])

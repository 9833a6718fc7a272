"""Judges what `optimize` made of one block, against the untouched block, without trusting either.

* proven: the experts were rewritten, and the oracle proved it; outputs and every gradient agree.
* refused: the report says why, and the block computes what it did.
* wrong: outputs or gradients differ.
* silent: no site of the report says what became of the experts; or a rewrite that is not used.
* crashed: `optimize`, or what it returned, raised.
"""

import copy
import logging
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.fuzz.draw import draw
from moe_compile.fuzz.load import load
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.install import forward as installed
from moe_compile.report import Report

Outcome = Literal["proven", "refused", "wrong", "silent", "crashed"]
OUTCOMES: tuple[Outcome, ...] = ("proven", "refused", "wrong", "silent", "crashed")
FAILURES: tuple[Outcome, ...] = ("wrong", "silent", "crashed")

EXAMPLE = (2, 6)
FRESH = ((1, 5), (3, 7), (1, 2))
"""Batch and sequence: the example that `optimize` sees, and the sizes at which it is judged."""

TOLERANCE = 1e-4

_WITH_AUTOCAST = 8
"""Of so many blocks one is captured for autocast, too, which nearly doubles its time."""
_NEGLIGIBLE = 1e-2

Optimize = Callable[..., nn.Module]


@dataclass(frozen=True)
class Verdict:
    """What became of one block.

    Attributes:
        reason: why it was refused, or what is wrong; empty for a proven block.
        seconds: of the whole judgement.
        steps: seconds of each step of `optimize`.
    """

    spec: BlockSpec
    outcome: Outcome
    reason: str
    seconds: float
    steps: dict[str, float] = field(default_factory=dict[str, float])


def judge(spec: BlockSpec, *, verify: Literal["off", "raise", "full"] = "full") -> Verdict:
    """Optimizes a copy of the block and compares it with the original."""
    start = time.perf_counter()
    report: Report | None = None
    try:
        original = load(spec)
        candidate = copy.deepcopy(original)
        example = _input(spec, EXAMPLE)
        autocast = spec.seed % _WITH_AUTOCAST == 0
        config = OptimizeConfig(verify=verify, compile=False, autocast=autocast)
        moe_compile.optimize(candidate, example_inputs=(example,), config=config)
        report = moe_compile.report(candidate)
        outcome, reason = _compare(spec, original, candidate, report)
    except Exception:  # the judged code may fail in any way, and every way is a finding
        outcome, reason = "crashed", traceback.format_exc()
    steps = {} if report is None else report.seconds
    return Verdict(spec, outcome, reason, time.perf_counter() - start, steps)


def judge_seed(seed: int) -> Verdict:
    """The verdict on the block of a seed."""
    return judge(draw(seed))


def _compare(
    spec: BlockSpec, original: nn.Module, candidate: nn.Module, report: Report
) -> tuple[Outcome, str]:
    with _fallbacks() as fallbacks:
        for size in FRESH:
            x = _input(spec, size)
            problem = difference(measure(original, x), measure(candidate, x))
            if problem is not None:
                return "wrong", f"batch and sequence {size}: {problem}"
    return _claimed(report, fallbacks)


def _claimed(report: Report, fallbacks: list[str]) -> tuple[Outcome, str]:
    """What the report says of the experts, of a candidate that computes what it should."""
    sites = [site for site in report.sites if site.kind == "experts"]
    if not sites:
        return "silent", "no site of the report is about experts"
    open_sites = [site for site in sites if site.status != "rewritten"]
    if any(not site.reason for site in open_sites):
        return "silent", "a site was not rewritten, and there is no reason"
    if open_sites:
        return "refused", open_sites[0].reason or ""
    if fallbacks:
        return "silent", f"the rewrite is not used: {fallbacks[0]}"
    return "proven", ""


def measure(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every output in training and evaluation, and every gradient."""
    x = x.clone().requires_grad_()
    model.train()
    outputs = _floats(model(x))
    parameters = dict(model.named_parameters())
    cotangents = [_normal(100 + i, y.shape) for i, y in enumerate(outputs)]
    sources = {"the input": x, **parameters}
    gradients = torch.autograd.grad(
        outputs, list(sources.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    model.eval()
    with torch.no_grad():
        evaluated = _floats(model(x))
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    named |= {f"output {i} in evaluation": y for i, y in enumerate(evaluated)}
    return named | {f"gradient of {n}": g for n, g in zip(sources, gradients, strict=True)}


def difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> str | None:
    """The largest relative L2 error above the tolerance, in words.

    A gradient that is zero but for rounding has no relative error: one that is negligible beside
    the largest is judged by that.
    """
    if expected.keys() != actual.keys():
        return f"{sorted(actual)} instead of {sorted(expected)}"
    norms = {name: value.norm().item() for name, value in expected.items()}
    floor = _NEGLIGIBLE * max(norms.values()) or 1.0  # all is zero where a mean takes itself away
    errors: dict[str, float] = {}
    for name, value in expected.items():
        if value.shape != actual[name].shape:
            return f"{name} has shape {tuple(actual[name].shape)}, not {tuple(value.shape)}"
        errors[name] = (actual[name] - value).norm().item() / max(norms[name], floor)
    bad = {name: error for name, error in errors.items() if not error <= TOLERANCE}  # also NaN
    return ", ".join(f"{name} is off by {error:.1e}" for name, error in bad.items()) or None


@contextmanager
def _fallbacks() -> Generator[list[str]]:
    """Collects the warnings of rewritten modules that run their own code in training."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Collect(), logging.getLogger(installed.__name__)
    installed._warned.clear()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _floats(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def _input(spec: BlockSpec, size: tuple[int, int]) -> Tensor:
    return _normal(spec.seed, torch.Size((*size, spec.hidden)))


def _normal(seed: int, size: torch.Size) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))

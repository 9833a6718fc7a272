"""Which provider computes a call fastest: timed on this device, or remembered from an earlier time.

On several ranks rank 0 times, and tells the others: every rank must choose the same.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from moe_compile.config import OptimizeConfig
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.parallel.agree import check_agreement, said_by_first
from moe_compile.parallel.layout import Layout
from moe_compile.providers.provider import Call, Provider
from moe_compile.rewrite.refuse import Refuse
from moe_compile.timing.cache import TimingCache
from moe_compile.timing.inputs import Form, Sizes, describe, forms_of
from moe_compile.timing.progress import Progress
from moe_compile.timing.race import Race

_SEQUENCE = {"cuda": 4096, "cpu": 128}
"""A sequence that fills the device, as one of training does; a batch has two."""


@dataclass(frozen=True)
class Timing:
    """What is known of the candidates for one call.

    Attributes:
        call: the arguments that they were timed with.
        milliseconds: of a forward and backward, by provider; empty where none was timed.
        failures: why a provider could not be timed.
        reason: why none was.
    """

    call: str = ""
    milliseconds: Mapping[str, float] = field(default_factory=dict[str, float])
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    reason: str | None = None

    def first(self, takers: Sequence[Provider]) -> Provider:
        """The fastest; without timings the preferred one."""
        timed = [provider for provider in takers if provider.name in self.milliseconds]
        return min(timed or takers[:1], key=lambda p: self.milliseconds.get(p.name, 0.0))


@dataclass(frozen=True)
class Contests:
    """Decides between providers for one run of `optimize`; each call is timed once.

    Attributes:
        device: where the model will train.
        sizes: the numbers for symbolic sizes.
        layout: the ranks that must agree; None for one process.
        off: why nothing is timed; None where it is.
        options: for `torch.compile`; None where code runs as it is.
        cache: what earlier runs found.
        known: what this one did.
        seconds: what each timing took.
    """

    device: torch.device
    sizes: Sizes
    layout: Layout | None = None
    off: str | None = None
    options: Mapping[str, Any] | None = None
    cache: TimingCache = field(default_factory=TimingCache)
    known: dict[str, Timing] = field(default_factory=dict[str, Timing])
    progress: Progress = field(default_factory=Progress)
    seconds: list[float] = field(default_factory=list[float])

    @classmethod
    def of(
        cls,
        config: OptimizeConfig,
        device: torch.device,
        layout: Layout | None,
        batch: torch.SymInt,
        sequence: torch.SymInt,
    ) -> "Contests":
        """Those of a model with symbolic sizes of its calls."""
        sizes = Sizes.of(batch, sequence, _numbers(config.max_tokens_per_rank, device))
        return cls(device, sizes, layout, _why_off(config, device))

    def decide(self, op: CanonicalOp[..., Any], call: Call, takers: Sequence[Provider]) -> Timing:
        """What is known of the providers that take a call; times them if nothing is."""
        if self.off is not None:
            return Timing(reason=self.off)
        try:
            forms = forms_of(op, call, self.sizes)
        except Refuse as refusal:
            return Timing(reason=refusal.reason)
        race = Race(op, forms, _autocast(call, forms), takers, self.device, self.options)
        key = race.key()
        if key not in self.known:
            start = time.perf_counter()
            self.known[key] = self._agreed(key, race)
            self.seconds.append(time.perf_counter() - start)
        return self.known[key]

    def _agreed(self, key: str, race: Race) -> Timing:
        if self.layout is None:
            return self._found(key, race)
        # A rank that had other candidates, or none, would leave the others waiting.
        check_agreement([key], self.layout)
        found = json.dumps(asdict(self._found(key, race))) if self.layout.rank == 0 else ""
        return Timing(**json.loads(said_by_first(found, self.layout)))

    def _found(self, key: str, race: Race) -> Timing:
        """From the cache, or by timing."""
        call, record = describe(race.forms), self.cache.read(key)
        if record is None:
            try:
                record = race.run(self.progress)
            except Refuse as refusal:
                return Timing(call, reason=refusal.reason)
            self.cache.add(key, record)
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        failures = {name: value for name, value in record.items() if isinstance(value, str)}
        return Timing(call, numbers, failures, None if numbers else "each of them fails")


def _autocast(call: Call, forms: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of the autocast, unless all numbers have it: then it has next to nothing to do."""
    dtypes = {form.dtype for form in forms.values() if isinstance(form, Form)}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return None if floating == {call.autocast} else call.autocast


def _numbers(max_tokens: int | None, device: torch.device) -> tuple[int, int]:
    """A batch and a sequence; together the tokens that a rank may bring, if that is promised."""
    length = _SEQUENCE.get(device.type, 1)
    if max_tokens is None:
        return 2, length
    return max(max_tokens // length, 1), min(max_tokens, length)


def _why_off(config: OptimizeConfig, device: torch.device) -> str | None:
    if device.type not in _SEQUENCE:
        return f"only cuda and cpu have a clock here, not {device.type}"
    if config.deterministic:
        return "OptimizeConfig(deterministic=True): another run could choose another"
    if config.measure is False:
        return "OptimizeConfig(measure=False)"
    if config.measure == "auto" and device.type != "cuda":
        return "on a CPU only OptimizeConfig(measure=True) times them"
    return None

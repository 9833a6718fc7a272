"""Candidates for one call of an op, timed one after the other on the same random tensors.

Each runs as it will in the model: through `torch.compile` where the layer is compiled (for these
sizes alone: `dynamic=False`), with autocast where the call has it. It is timed alone, without the
neighbours that Inductor may fuse it with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Provider
from moe_compile.rewrite.refuse import Refuse
from moe_compile.timing import measure
from moe_compile.timing.cache import Record
from moe_compile.timing.inputs import Form, describe, make
from moe_compile.timing.progress import Progress
from moe_compile.timing.versions import device_name, named, versions

_COPIES = 4
"""Of a call's inputs: themselves, their gradients, and about as much again on the way."""

_LONGEST = 200
"""The letters of an error that a report has."""


@dataclass(frozen=True)
class Race:
    """One call and who can compute it.

    Attributes:
        op: the canonical op.
        forms: its arguments, with forms of tensors.
        autocast: the dtype of the autocast that the call runs under, or None.
        takers: the candidates.
        device: where they run.
        options: for `torch.compile`; None where code runs as it is.
    """

    op: CanonicalOp[..., Any]
    forms: Mapping[str, Any]
    autocast: torch.dtype | None
    takers: Sequence[Provider]
    device: torch.device
    options: Mapping[str, Any] | None

    def key(self) -> str:
        """All that the times depend on, as one text."""
        how = "as it is" if self.options is None else f"compiled {dict(self.options)}"
        if self.autocast is not None:
            how += f", autocast to {self.autocast}"
        names = ", ".join(map(named, self.takers))
        what = f"{self.op.name} of {describe(self.forms)}"
        return f"{what}; by {names}; {how}; {versions()}; {device_name(self.device)}"

    def run(self, progress: Progress) -> Record:
        """Times every candidate.

        Raises:
            Refuse: the tensors do not fit into what is left of the device's memory.
        """
        needed = _COPIES * sum(f.bytes for f in self.forms.values() if isinstance(f, Form))
        free = measure.free_bytes(self.device)
        if needed > free:
            raise Refuse(
                f"timing needs about {needed / 2**30:.1f} GiB: {free / 2**30:.1f} GiB are free"
            )
        is_cuda = self.device.type == "cuda"
        try:
            with torch.random.fork_rng([self.device] if is_cuda else []):
                return self._times(progress)
        except torch.OutOfMemoryError:
            raise Refuse("the device ran out of memory while candidates were timed") from None
        finally:
            if is_cuda:
                torch.cuda.empty_cache()

    def _times(self, progress: Progress) -> Record:
        given = (make(self.forms, self.device), self.device, self.options, self.autocast)
        steps: dict[str, Callable[[], None]] = {}
        failures: Record = {}
        for provider in self.takers:
            progress.tell(f"{self.op.name}: {provider.name}")
            try:
                implementation = provider.implementation(self.op)
                steps[provider.name] = measure.prepare(implementation, *given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a package's own, on a device or release it does not fit
                text = " ".join(str(error).split())[:_LONGEST]
                failures[provider.name] = f"it fails: {type(error).__name__}: {text}"
        return failures | (measure.milliseconds(steps, self.device) if steps else {})

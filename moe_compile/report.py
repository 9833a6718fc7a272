"""What `optimize` did, for people and for programs."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["rewritten", "kept", "refused"]


@dataclass(frozen=True)
class NearMissReport:
    """What came closest where experts were refused.

    Attributes:
        pattern: the closest pattern; None if no operation of any fitted.
        progress: how far it got.
        node: the first node of the graph that did not fit, with its line in the model's source.
        reason: why it did not fit.
        remedy: what would make it match.
    """

    pattern: str | None
    progress: str
    node: str
    reason: str
    remedy: str

    def lines(self, module: str, layers: int) -> list[str]:
        """Five lines, to be read in order."""
        return [
            f"{module} ({layers} {'layer' if layers == 1 else 'layers'}) is refused",
            f"  closest pattern:  {self.pattern or 'none'}",
            f"  how far:          {self.progress}",
            f"  first misfit:     {self.node}",
            f"  why:              {self.reason}; to match: {self.remedy}",
        ]


@dataclass(frozen=True)
class Choice:
    """Why one provider computes an op that several could.

    Attributes:
        op: the canonical op.
        provider: the one that was chosen.
        call: the arguments that the candidates were timed with; empty where none was.
        milliseconds: of a forward and backward, by provider; empty where none was timed.
        left_out: why other providers were no candidates.
        reason: why preference decided; None where timings did, or there was one candidate.
    """

    op: str
    provider: str
    call: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict[str, float])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    reason: str | None = None

    def __str__(self) -> str:
        own = self.milliseconds.get(self.provider)
        if own is None:
            return self.provider
        others = sorted((t, name) for name, t in self.milliseconds.items() if name != self.provider)
        numbers = [f"{own:.2f} ms", *(f"{name} {t:.2f}" for t, name in others)]
        return f"{self.provider} ({'; '.join(numbers)})"


@dataclass(frozen=True)
class Site:
    """One idiom in one group of identical layers.

    Attributes:
        module: the full name of the owner in the first layer of the group.
        layers: how many layers have it.
        kind: experts, router, rms_norm, attention, rope, mlp, linear or loss.
        pattern: the pattern that matched, or the nearest miss of a refused site; None if neither.
        status: rewritten; kept (recognised, and the original is as fast); or refused.
        reason: why it was not rewritten; None only when it was.
        provider: who implements it; None if it was not rewritten.
        near_miss: of refused experts, what came closest; None where there is no graph of them.
        timings: the choices between several providers, one for each form of the call.
        numerics: what it computes with where a pass changed that on purpose; None for what is as
            exact as the original.
        tolerance: the error that verification then allows.
        error: then the largest error of an output or gradient in L2 norm, as verification found it
            on small tensors; None where it was not run.
    """

    module: str
    layers: int
    kind: str
    pattern: str | None
    status: Status
    reason: str | None = None
    provider: str | None = None
    near_miss: NearMissReport | None = None
    timings: tuple[Choice, ...] = ()
    numerics: str | None = None
    tolerance: float = 0.0
    error: float | None = None

    def providers(self) -> str:
        """Who implements it, each with the first of its timings."""
        names = [] if self.provider is None else self.provider.split(", ")
        timed = {c.provider: str(c) for c in reversed(self.timings) if c.milliseconds}
        found = ", ".join(timed.get(name, name) for name in names)
        return found if self.numerics is None else f"{found}, in {self.numerics}"


@dataclass(frozen=True)
class PassSummary:
    """A pass over all captures: changes made, and nodes before and after it."""

    name: str
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """The result of `optimize` or `explain`. `str()` is a table, `to_json()` a dict.

    Below the table are five lines for each experts that were refused: the near miss.
    `dispatchers` are the providers that carry tokens between ranks; to each belongs the reason why
    the one that was preferred, or asked for, could not. They are part of `mesh` in the dict.
    `schedules` are what modules do while their tokens travel, or why they do nothing, by the
    module's name in the first layer of its group; part of `mesh` too, and empty without a pass that
    overlaps.
    `not_quantized` are the products that keep their dtype beside others that a pass quantised, by
    module, with the reason.
    """

    sites: tuple[Site, ...]
    passes: tuple[PassSummary, ...]
    captures: int
    mesh: dict[str, int] = field(default_factory=dict[str, int])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    dispatchers: dict[str, str | None] = field(default_factory=dict[str, str | None])
    schedules: dict[str, str] = field(default_factory=dict[str, str])
    not_quantized: dict[str, str] = field(default_factory=dict[str, str])

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and values."""
        travels = {"dispatchers": self.dispatchers, "schedules": self.schedules}
        return {
            "sites": [
                asdict(site) | {"timings": [asdict(choice) for choice in site.timings]}
                for site in self.sites
            ],
            "passes": [asdict(step) for step in self.passes],
            "captures": self.captures,
            "mesh": self.mesh | {name: found for name, found in travels.items() if found},
            "not_quantized": dict(self.not_quantized),
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        header = ("module", "layers", "kind", "pattern", "status", "provider or reason")
        rows = [_row(site) for site in self.sites]
        lines = _table(header, rows)
        for site in self.sites:
            if site.near_miss is not None:
                lines += ["", *site.near_miss.lines(site.module, site.layers)]
        lines += [""] if any(site.near_miss for site in self.sites) else []
        if not any(site.kind == "experts" for site in self.sites):
            lines.append("No mixture-of-experts block was found in this model.")
        for name, reason in self.dispatchers.items():
            lines.append(f"Tokens travel by {name}" + (f", as {reason}" if reason else "") + ".")
        lines += [f"Schedule of {name}: {steps}." for name, steps in self.schedules.items()]
        lines += [*_numerics_lines(self.sites), *_wide_lines(self.not_quantized)]
        lines += _choice_lines([choice for site in self.sites for choice in site.timings])
        timing = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        lines.append(f"{self.captures} captures; {timing}")
        return "\n".join(lines)


def _row(site: Site) -> tuple[str, ...]:
    why = site.providers() if site.reason is None else site.reason
    return (
        site.module,
        str(site.layers),
        site.kind,
        site.pattern or "-",
        site.status,
        why or "-",
    )


def _numerics_lines(sites: tuple[Site, ...]) -> list[str]:
    """That results differ on purpose, and by how much; a line for each kind of numbers."""
    lines: list[str] = []
    for name in dict.fromkeys(site.numerics for site in sites if site.numerics is not None):
        own = [site for site in sites if site.numerics == name]
        errors = [site.error for site in own if site.error is not None]
        found = f"by up to {max(errors):.1e} where that was measured" if errors else "not measured"
        count = f"{len(own)} of these sites" if len(own) > 1 else "one of these sites"
        allowed = max(site.tolerance for site in own)
        lines.append(
            f"NOT EXACT: {name} in {count}. Outputs and gradients on small tensors differ from "
            f"exact ones in L2 norm, {found}; verification allows {allowed:.1e}."
        )
    return lines


def _wide_lines(modules: dict[str, str]) -> list[str]:
    """What keeps its dtype, a line for each reason."""
    found: dict[str, list[str]] = {}
    for name, reason in modules.items():
        found.setdefault(reason, []).append(name)
    return [f"Not quantised: {', '.join(names)}; {reason}." for reason, names in found.items()]


def _choice_lines(choices: list[Choice]) -> list[str]:
    """Where preference decided, and which providers were no candidates, a line for each reason."""
    untimed: dict[str, dict[str, None]] = {}
    left_out: dict[str, dict[str, None]] = {}
    for choice in choices:
        if choice.reason is not None:
            untimed.setdefault(choice.reason, {})[choice.op] = None
        for name, reason in choice.left_out.items():
            left_out.setdefault(f"{name}: {reason}", {})[choice.op] = None
    return [
        *(
            f"Preferred, not timed: providers of {', '.join(ops)}; {why}."
            for why, ops in untimed.items()
        ),
        *(f"No candidate for {', '.join(ops)} is {who}." for who, ops in left_out.items()),
    ]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]

"""Writes the experts' parameters, and their products with tokens."""

from dataclasses import dataclass

from moe_compile.fuzz.spec import BlockSpec


@dataclass(frozen=True)
class Weight:
    """A stack of matrices, [E, out, in] or [E, in, out]; `flat` ones have their experts as rows."""

    name: str
    rows: int
    columns: int
    out_first: bool
    flat: bool
    bias: str | None

    def stack(self) -> str:
        """The expression of the stack."""
        if not self.flat:
            return f"self.{self.name}"
        return f"self.{self.name}.view(self.num_experts, {self.rows}, {self.columns})"


@dataclass(frozen=True)
class Place:
    """Where products happen: `one` expert, all experts `batched`, rows `grouped`, weights gathered.

    Attributes:
        kind: one, batched, broadcast, grouped, einsum or bmm.
        index: the expression that picks an expert's slice out of a stack.
    """

    kind: str
    index: str = ""

    def slice(self, name: str) -> str:
        """The rows of a per-expert vector that belong to the products' rows."""
        return (
            f"self.{name}.unsqueeze(1)"
            if self.kind in ("batched", "broadcast")
            else f"self.{name}[{self.index}]"
        )

    def product(self, weight: Weight, x: str, *, first: bool) -> str:
        """The expression of the projection of `x`."""
        if self.kind == "one" and weight.out_first:
            bias = f", {self.slice(weight.bias)}" if weight.bias else ""
            return f"F.linear({x}, {weight.stack()}[{self.index}]{bias})"
        product = _PRODUCTS[self.kind](weight, x, self.index, first)
        return f"{product} + {self.slice(weight.bias)}" if weight.bias else product


def _one(weight: Weight, x: str, index: str, first: bool) -> str:
    return f"{x} @ {weight.stack()}[{index}]"


def _batched(weight: Weight, x: str, index: str, first: bool) -> str:
    if weight.out_first:
        return f"torch.bmm({x}, {weight.stack()}.transpose(1, 2))"
    return f"torch.bmm({x}, {weight.stack()})"


def _broadcast(weight: Weight, x: str, index: str, first: bool) -> str:
    view = ".mT" if weight.out_first else ""
    return f"torch.matmul({x}, {weight.stack()}{view})"


def _grouped(weight: Weight, x: str, index: str, first: bool) -> str:
    view = ".transpose(-2, -1)" if weight.out_first else ""
    return f"F.grouped_mm({x}, {weight.stack()}{view}, offs=offs)"


def _einsum(weight: Weight, x: str, index: str, first: bool) -> str:
    matrix = "tkoi" if weight.out_first else "tkio"
    return (
        f'torch.einsum("{"ti" if first else "tki"},{matrix}->tko", {x}, {weight.stack()}[{index}])'
    )


def _bmm(weight: Weight, x: str, index: str, first: bool) -> str:
    if weight.out_first:
        return f"torch.bmm({weight.stack()}[{index}], {x}.unsqueeze(-1)).squeeze(-1)"
    return f"torch.bmm({x}.unsqueeze(1), {weight.stack()}[{index}]).squeeze(1)"


_PRODUCTS = {
    "one": _one,
    "batched": _batched,
    "broadcast": _broadcast,
    "grouped": _grouped,
    "einsum": _einsum,
    "bmm": _bmm,
}


def weights(spec: BlockSpec) -> tuple[list[Weight], Weight]:
    """The up projections (one, or gate and up) and the down projection of stacked experts."""
    up_width = 2 * spec.width if spec.gated and not _is_separate(spec) else spec.width
    names = _up_names(spec)
    out_first = not spec.storage.endswith("transposed")
    flat = spec.storage == "flat"
    down = "w2" if _is_separate(spec) else "down_proj"
    # Flat experts store both projections with the inner width as rows.
    down_first = out_first and not flat
    ups = [_weight(spec, name, up_width, spec.inner, out_first, flat) for name in names]
    return ups, _weight(spec, down, spec.inner, spec.width, down_first, flat)


def _is_separate(spec: BlockSpec) -> bool:
    return spec.storage in ("separate", "separate_transposed", "flat")


def _up_names(spec: BlockSpec) -> list[str]:
    if _is_separate(spec):
        return ["w1", "v1" if spec.storage == "flat" else "w3"] if spec.gated else ["w1"]
    return ["gate_up_proj"] if spec.gated else ["up_proj"]


def _weight(
    spec: BlockSpec, name: str, out: int, width: int, out_first: bool, flat: bool
) -> Weight:
    rows, columns = (out, width) if out_first else (width, out)
    return Weight(name, rows, columns, out_first, flat, f"{name}_bias" if spec.bias else None)


def stacked_state(spec: BlockSpec) -> list[str]:
    """The constructor's lines of stacked experts."""
    lines: list[str] = []
    ups, down = weights(spec)
    for w in (*ups, down):
        size = f"{spec.experts} * {w.rows}, {w.columns}"
        size = size if w.flat else f"{spec.experts}, {w.rows}, {w.columns}"
        lines.append(f"self.{w.name} = nn.Parameter(torch.empty({size}))")
        if w.bias:
            out = w.rows if w.out_first else w.columns
            lines.append(f"self.{w.bias} = nn.Parameter(torch.empty({spec.experts}, {out}))")
    if spec.expert_norm != "none":
        size = f"{spec.experts}, {spec.inner}" if spec.expert_norm == "own" else f"{spec.inner}"
        lines.append(f"self.norm_weight = nn.Parameter(torch.ones({size}))")
    return lines

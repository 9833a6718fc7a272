"""Real arguments for a call of an op that a graph makes with fake ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.install.emit import emit_region
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Call
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import Region

_CONSTANTS = {"cos", "sin", "mask"}
"""Arguments of floats of which training wants no gradient."""


@dataclass(frozen=True)
class Sizes:
    """Numbers for symbolic sizes; `tokens` for those that data decides, such as routed rows."""

    symbols: Mapping[Any, sympy.Integer]
    tokens: int

    @classmethod
    def of(cls, batch: torch.SymInt, sequence: torch.SymInt, numbers: tuple[int, int]) -> "Sizes":
        """The sizes of a model's calls with `numbers` for the batch and the sequence."""
        symbols = zip((batch, sequence), numbers, strict=True)
        known = {size.node.expr: sympy.Integer(number) for size, number in symbols}
        return cls(known, numbers[0] * numbers[1])

    def number(self, size: int | torch.SymInt) -> int:
        """A number for a size.

        Raises:
            Refuse: the size has other unknowns.
        """
        if isinstance(size, int):
            return size
        routed = dict.fromkeys(free_unbacked_symbols(size), sympy.Integer(self.tokens))
        number = size.node.expr.xreplace(routed | dict(self.symbols))
        if not number.is_Integer:
            raise Refuse(f"nobody knows a number for the size {size} of an argument")
        return int(number)


@dataclass(frozen=True)
class Form:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers lie between its first and its last, these included."""
        spans = ((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return 1 + sum(spans) if all(self.shape) else 0

    @property
    def bytes(self) -> int:
        """What it takes of memory."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        plain = torch.empty(self.shape, device="meta").stride()
        return kind if self.stride == plain else f"{kind} by {list(self.stride)}"


def forms_of(op: CanonicalOp[..., Any], call: Call, sizes: Sizes) -> dict[str, Any]:
    """Every argument of a call by name: forms of tensors, and plain values.

    Raises:
        Refuse: an argument has a size that nobody knows.
    """
    found: dict[str, Any] = {}
    for name, value in call.arguments(op).items():
        if isinstance(value, Tensor) and value.numel() == 0:
            found[name] = None  # tells a size: here all picks are real
        elif isinstance(value, Tensor):
            shape, stride = (
                tuple(map(sizes.number, numbers)) for numbers in (value.shape, value.stride())
            )
            found[name] = Form(value.dtype, shape, stride)
        else:
            found[name] = sizes.number(value) if isinstance(value, torch.SymInt) else value
    return found


def describe(forms: Mapping[str, Any]) -> str:
    """The arguments as text that is the same in every process; what is not given is left out."""
    given = {name: value for name, value in forms.items() if value is not None}
    return ", ".join(f"{n} {getattr(value, 'key', value)}" for n, value in given.items())


def make(forms: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Random tensors for the forms; picks are experts of `up`. Regions become functions."""
    generator = torch.Generator(device).manual_seed(0)
    experts = forms["up"].shape[0] if "ids" in forms else 1
    made = dict(forms)
    for name, value in forms.items():
        if isinstance(value, Form):
            made[name] = _tensor(name, value, generator, experts)
        elif isinstance(value, Region):
            made[name] = emit_region(value, name)  # as in a layer: Dynamo reads no graphs
    return made


def _tensor(name: str, form: Form, generator: torch.Generator, experts: int) -> Tensor:
    options: dict[str, Any] = {"device": generator.device, "dtype": form.dtype}
    if form.dtype == torch.bool:  # a mask: what is seen
        return torch.ones(form.shape, **options).tril().as_strided(form.shape, form.stride)
    if not form.dtype.is_floating_point:
        picks = torch.randint(experts, (form.elements,), generator=generator, **options)
        return picks.as_strided(form.shape, form.stride)
    if name == "mask":
        return torch.zeros(form.elements, **options).as_strided(form.shape, form.stride)
    numbers = torch.randn(form.elements, generator=generator, **options)
    tensor = numbers.as_strided(form.shape, form.stride)
    return tensor.requires_grad_(name not in _CONSTANTS)

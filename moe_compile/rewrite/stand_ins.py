"""Random functions in the place of experts, to prove what is around them."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compile.rewrite.expert_bodies import Bodies, Step
from moe_compile.rewrite.normal_form import value

_RANK = 2


def positive(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers above zero."""
    return torch.rand(size, generator=generator, dtype=torch.float64) + 0.1


@dataclass(frozen=True)
class StandIns:
    """Functions in the place of the bodies; each expert has its own.

    A product has the width of the real one and rank 2, so that large experts cost little: `up` is
    [E, H, 2], plus `up_bias` [E, 2], then `wide` [2, N]; `narrow` [I, 2], then `down` [E, 2, Hout],
    plus `down_bias` [E, Hout], times `norm` [E, Hout]. A bias is None where experts give nothing
    for nothing, the norm where the experts have none of their own.
    """

    up: Tensor
    up_bias: Tensor | None
    wide: Tensor
    narrow: Tensor
    down: Tensor
    down_bias: Tensor | None
    norm: Tensor | None

    @classmethod
    def draw(cls, bodies: Bodies, hidden: int, generator: torch.Generator) -> list[Tensor]:
        """Random tensors for `of`."""
        return [positive(size, generator) for size in cls.sizes(bodies, hidden)]

    @staticmethod
    def sizes(bodies: Bodies, hidden: int) -> tuple[tuple[int, ...], ...]:
        """Those of the tensors that `of` takes: without elements where there are none."""
        experts, out = bodies.count, value(bodies.results[0]).shape[-1]
        return (
            (experts, hidden, _RANK),
            (experts * _has_up_bias(bodies), _RANK),
            (_RANK, bodies.up_width),
            (_hidden_width(bodies), _RANK),
            (experts, _RANK, out),
            (experts * bodies.has_offset, out),
            (experts * _has_norm(bodies), out),
        )

    @classmethod
    def of(cls, bodies: Bodies, tensors: tuple[Tensor, ...]) -> "StandIns":
        """The functions of these tensors, in the order of the fields."""
        up, up_bias, wide, narrow, down, down_bias, norm = tensors
        return cls(
            up,
            up_bias if _has_up_bias(bodies) else None,
            wide,
            narrow,
            down,
            down_bias if bodies.has_offset else None,
            norm if _has_norm(bodies) else None,
        )

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Tensor, ...]]:
        """Each expert's own of a stack: the gradient of an index would be as large as the stack."""
        stacks = {"up": self.up, "down": self.down, "down_bias": self.down_bias, "norm": self.norm}
        return {name: stack.unbind() for name, stack in stacks.items() if stack is not None}

    def part(self, name: str, experts: int | Tensor) -> Tensor:
        """What one expert has of a stack, or several have."""
        if isinstance(experts, int):
            return self._parts[name][experts]
        return getattr(self, name)[experts]

    def _product(self, step: Step, rows: Tensor, experts: int | Tensor) -> Tensor:
        """Rows after a product: all of one expert, or each of its own."""
        if step.kind == "up":
            return _multiply(rows, self.part("up", experts))
        result = _multiply(rows @ self.narrow, self.part("down", experts))
        if step.bias_ids is None and self.down_bias is not None:
            result = result + self.part("down_bias", experts)
        if step.norm_ids is None and self.norm is not None:
            result = result * self.part("norm", experts)
        return result

    def _biased(self, step: Step, result: Tensor, env: dict[Any, Any]) -> Tensor:
        """The end of a product: a bias that is said apart, and the width of the real one."""
        stack = self.down_bias if step.kind == "down" else self.up_bias
        if step.bias_ids is not None and stack is not None:
            result = result + stack[env[step.bias_ids]]
        if step.norm_ids is not None and self.norm is not None:
            result = result * self.norm[env[step.norm_ids]]
        if step.kind == "down":
            return result
        width = value(step.result).shape[-1]
        return result @ self.wide[:, step.place * width : (step.place + 1) * width]

    def activation(self, hidden: Tensor) -> Tensor:
        """Of rows one by one: neither linear nor even, and zero at zero."""
        width = self.narrow.shape[0]
        return hidden[..., :width] + hidden[..., :width] * hidden[..., -width:]

    def between(self, hidden: Tensor) -> Tensor:
        """All from the first product's two columns to the last one's."""
        if not hidden.numel():
            return hidden
        return self.activation(hidden @ self.wide) @ self.narrow

    def run(self, step: Step, env: dict[Any, Any]) -> Tensor:
        """The result of one step."""
        values: list[Tensor] = [env[node] for node in step.inputs]
        if step.expert is not None and not values[0].numel():
            return values[0].new_zeros(*values[0].shape[:-1], value(step.result).shape[-1])
        if step.kind == "act":
            return self.activation(torch.cat(values, -1))
        return self._biased(step, self._multiplied(step, values[0], env), env)

    def _multiplied(self, step: Step, rows: Tensor, env: dict[Any, Any]) -> Tensor:
        if step.expert is not None:
            return self._product(step, rows, step.expert)
        if step.ids is not None:
            for dim in step.missing:
                rows = rows.unsqueeze(dim)
            return self._product(step, rows, env[step.ids])
        if step.ends is None:
            each = rows.expand(len(self.up), *rows.shape[1:])
            return torch.stack([self._product(step, own, e) for e, own in enumerate(each)])
        ends = [0, *env[step.ends].tolist()]
        pieces = [rows[start:end] for start, end in itertools.pairwise(ends)]
        results = [self._product(step, own, e) for e, own in enumerate(pieces)]
        beyond = rows.shape[0] - ends[-1]
        return torch.cat([*results, results[0].new_zeros(beyond, results[0].shape[1])])


def _multiply(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows times one matrix, or each times its own."""
    if matrices.dim() == 2:
        return rows @ matrices
    return (rows.unsqueeze(-2) @ matrices).squeeze(-2)


def _hidden_width(bodies: Bodies) -> int:
    """What the activation gives a row."""
    return next(value(step.result).shape[-1] for step in bodies.steps if step.kind == "act")


def _has_up_bias(bodies: Bodies) -> bool:
    """Whether the bias of first products is said apart."""
    return any(step.kind == "up" and step.bias_ids is not None for step in bodies.steps)


def _has_norm(bodies: Bodies) -> bool:
    """Whether each expert has a norm of its own."""
    return any(step.normed for step in bodies.steps)

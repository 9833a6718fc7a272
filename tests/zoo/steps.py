"""One training step of a family's model, and how far two of them are apart."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.zoo.inputs import loss_of

Values = dict[str, Tensor]

_NEGLIGIBLE = 1e-3
"""Of the largest gradient: one that is less, as of a bias of keys, is judged by that."""


def step(model: Any, call: dict[str, Any]) -> Values:
    """The loss and every whole gradient of one call."""
    model.zero_grad()
    loss = loss_of(model(**call))
    loss.backward()
    gradients = {n: _whole(_gradient(p)) for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | gradients


def worst_of(found: Values, wanted: Values) -> tuple[float, str]:
    """The largest relative error, and of what.

    A gradient that cancels out but for rounding has no relative error, so a negligible one is
    judged beside the largest; a missing one still shows.
    """
    assert found.keys() == wanted.keys()
    norms = {name: value.norm().item() for name, value in wanted.items()}
    floor = _NEGLIGIBLE * max(norms.values())
    errors = {
        name: (found[name].double() - value.double()).norm().item() / max(norms[name], floor)
        for name, value in wanted.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Of an expert that no token picked, a model's own loop leaves none; it stands for zeros."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()

"""Head and loss without all logits at once: chunks of rows, their gradients made in the forward.

A chunk's logits are turned into their gradient where they lie. A chunk has as many rows as the
hidden states have columns: its logits are as large as the gradient of the head's weight, which
there must be anyhow. It has no fewer than keep the products fast.

Source: the idea is that of Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Transform = Callable[[Tensor], Tensor]

_FEWEST_ROWS = 1024


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    transform: Transform | None = None,
    ignore_index: int = -100,
    mean: bool = True,
) -> Tensor:
    """`ops.linear_cross_entropy`; never waits for the device."""
    loss: Tensor = _LinearCrossEntropy.apply(
        x, weight, bias, labels, transform or _same, ignore_index, mean
    )
    return loss


def _same(logits: Tensor) -> Tensor:
    return logits


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients, for a loss whose own gradient is one, are made with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: Transform,
        ignore_index: int,
        mean: bool,
    ) -> Tensor:
        counts = labels != ignore_index
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        scale = counts.sum().to(loss.dtype).reciprocal() if mean else torch.ones_like(loss)
        grads = [
            torch.zeros_like(t) if t is not None and needed else None
            for t, needed in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        to_gradient = _compiled(transform) if x.is_cuda else _gradient_of(transform)
        size = max(x.shape[1], _FEWEST_ROWS)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits = F.linear(x[rows], weight, bias)
            loss += to_gradient(logits, labels[rows], counts[rows], scale)
            _accumulate(grads, x[rows], weight, logits, rows)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        grads = (None if g is None else g * outer.to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None, None


def _accumulate(
    grads: list[Tensor | None], x: Tensor, weight: Tensor, grad: Tensor, rows: slice
) -> None:
    """Adds what the gradient of a chunk's logits gives; `rows` is where the chunk lies."""
    grad_x, grad_weight, grad_bias = grads
    if grad_x is not None:
        torch.mm(grad, weight, out=grad_x[rows])
    if grad_weight is not None:
        grad_weight.addmm_(grad.t(), x)
    if grad_bias is not None:
        grad_bias += grad.sum(0)


@functools.cache
def _gradient_of(transform: Transform) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A function of logits [t, V], labels [t], whether each counts [t], and a scale.

    It gives the scaled sum of the losses; the logits become its gradient, in place.
    """

    def to_gradient(logits: Tensor, labels: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
        labels = torch.where(counts, labels, 0)[:, None]
        own, pull_back = torch.func.vjp(transform, logits)
        wide = own.to(scale.dtype)
        log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
        losses = log_sum - wide.gather(1, labels)
        hit = torch.arange(logits.shape[1], device=logits.device) == labels
        grad = (wide - log_sum).exp() - hit.to(wide.dtype)
        grad = torch.where(counts[:, None], grad * scale, 0)
        logits.copy_(pull_back(grad.to(own.dtype))[0])
        return torch.where(counts[:, None], losses, 0).sum() * scale

    return to_gradient


@functools.cache
def _compiled(transform: Transform) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same as kernels that read the logits twice and write them once."""
    run = torch.compile(_gradient_of(transform), fullgraph=True)

    def to_gradient(logits: Tensor, labels: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
        for rows in (logits, labels, counts):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return run(logits, labels, counts, scale)

    return to_gradient

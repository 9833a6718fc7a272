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
        new = torch.empty_like if len(x) else torch.zeros_like
        grads = [
            new(t) if t is not None and needed else None
            for t, needed in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        size = max(x.shape[1], _FEWEST_ROWS)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits = F.linear(x[rows], weight, bias)
            loss += _to_gradient(logits, labels[rows], scale, transform, ignore_index)
            _accumulate(grads, x[rows], weight, logits, rows)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place, so a second backward is autograd's own error.
        grads = ctx.saved_tensors
        for grad in grads:
            _scale(grad, grad_outputs[0])
        return *grads, None, None, None, None


def _scale(grad: Tensor | None, factor: Tensor) -> None:
    if grad is None:
        return
    if not grad.is_cuda or grad.dtype == torch.float64:
        grad *= factor.to(grad.dtype)
        return
    from moe_compile.kernels import loss_kernels

    loss_kernels.scale(grad, factor)


def _accumulate(
    grads: list[Tensor | None], x: Tensor, weight: Tensor, grad: Tensor, rows: slice
) -> None:
    """Adds what the gradient of a chunk's logits gives; `rows` is where the chunk lies."""
    grad_x, grad_weight, grad_bias = grads
    if grad_x is not None:
        torch.mm(grad, weight, out=grad_x[rows])
    is_first = rows.start == 0
    if grad_weight is not None and is_first:
        torch.mm(grad.t(), x, out=grad_weight)
    elif grad_weight is not None:
        grad_weight.addmm_(grad.t(), x)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0) if is_first else grad_bias + grad.sum(0))


def _to_gradient(
    logits: Tensor, labels: Tensor, scale: Tensor, transform: Transform, ignore_index: int
) -> Tensor:
    """The scaled sum of the losses of logits [t, V], which become its gradient, in place.

    Labels are [t]; what the transform makes of the logits is what the loss is of.
    """
    is_half = logits.dtype in (torch.bfloat16, torch.float16)
    if logits.is_cuda and transform is _same and (is_half or logits.dtype == torch.float32):
        from moe_compile.kernels import loss_kernels

        return loss_kernels.to_gradient(logits, labels, scale, ignore_index)
    if not logits.is_cuda:
        run = _gradient_of(transform)
    else:
        run = _compiled(transform, torch.are_deterministic_algorithms_enabled())
    return run(logits, labels, labels != ignore_index, scale)


@functools.cache
def _gradient_of(transform: Transform) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`_to_gradient` for one transform, of logits, labels, whether each counts, and a scale."""

    def to_gradient(logits: Tensor, labels: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
        labels = torch.where(counts, labels, 0)[:, None]
        # Element by element, so a forward derivative is the backward's; vjp can't run under hooks
        # on saved tensors.
        own, slope, *_ = torch.func.jvp(transform, (logits,), (torch.ones_like(logits),))
        wide = own.to(scale.dtype)
        log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
        losses = log_sum - wide.gather(1, labels)
        hit = torch.arange(logits.shape[1], device=logits.device) == labels
        grad = (wide - log_sum).exp() - hit.to(wide.dtype)
        grad = torch.where(counts[:, None], grad * scale, 0)
        logits.copy_(grad * slope)
        return torch.where(counts[:, None], losses, 0).sum() * scale

    return to_gradient


@functools.cache
def _compiled(
    transform: Transform, deterministic: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same as kernels that read the logits twice and write them once; if so, none by timing."""
    options: dict[str, Any] | None = {"deterministic": True} if deterministic else None
    run = torch.compile(_gradient_of(transform), fullgraph=True, options=options)

    def to_gradient(logits: Tensor, labels: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
        for rows in (logits, labels, counts):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return run(logits, labels, counts, scale)

    return to_gradient

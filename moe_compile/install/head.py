"""The head of a language model, which in training leaves its logits to be computed when needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile import ops
from moe_compile.adapters import transformers as hf
from moe_compile.config import OptimizeConfig
from moe_compile.install.deferred_logits import Backwards, DeferredLogits, Head, Loss, Transform
from moe_compile.install.forward import bind
from moe_compile.providers.provider import Call
from moe_compile.providers.registry import choose
from moe_compile.report import Site
from moe_compile.rewrite.refuse import Refuse


@dataclass(frozen=True)
class HeadPlan:
    """What becomes of the head: a site of the report, and the loss where it is deferred."""

    site: Site
    loss: Loss | None = None


def plan_head(model: nn.Module, config: OptimizeConfig) -> HeadPlan | None:
    """What becomes of the model's head; None where no head is known.

    Raises:
        ValueError: for a fused loss that cannot be had.
    """
    name, head = hf.head(model)
    try:
        if config.loss == "model":
            raise Refuse("OptimizeConfig(loss='model') asks for the model's own")
        provider, loss = _choose(head, config)
    except Refuse as refusal:
        if config.loss == "fused":
            raise ValueError(
                f"OptimizeConfig.loss got 'fused' for a model whose loss cannot be: "
                f"{refusal.reason}; it takes a model whose head is an nn.Linear; leave it out: the "
                "model computes its own loss"
            ) from None
        return None if head is None else HeadPlan(_site(name, reason=refusal.reason))
    return HeadPlan(_site(name, provider=provider), loss)


def install_head(model: nn.Module, plan: HeadPlan | None, *, sharded: bool) -> None:
    """Binds the deferring forward on a head that is rewritten.

    Where the head's weight will be `sharded`, logits cannot be read after a backward.
    """
    if plan is not None and plan.loss is not None:
        backwards = Backwards() if sharded else None
        bind(model.get_submodule(plan.site.module), _forward_for(plan.loss, backwards))


def _site(name: str, *, provider: str | None = None, reason: str | None = None) -> Site:
    status = "rewritten" if reason is None else "refused"
    return Site(name, 1, "loss", ops.linear_cross_entropy.name, status, reason, provider)


def _choose(head: nn.Module | None, config: OptimizeConfig) -> tuple[str, Loss]:
    """The provider's name and its implementation."""
    if type(head) is not nn.Linear:
        raise Refuse(f"the head is a {type(head).__name__}" if head else "no head is known")
    if "forward" in vars(head):
        raise Refuse("the head has a forward of its own already")
    op = ops.linear_cross_entropy
    weight = torch.empty_like(head.weight, device="meta")
    call = Call((weight[:0], weight, torch.empty(0, dtype=torch.int64, device="meta")))
    provider, _ = choose(op, call, config.wanted_providers().get(op.name))
    return provider.name, provider.implementation(op)


def _forward_for(loss: Loss, backwards: Backwards | None) -> Callable[..., Any]:
    """`nn.Linear.forward`, with deferred logits where a training step may want no more."""

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        is_step = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not is_step or type(self.weight) is not nn.Parameter or type(input) is not Tensor:
            return F.linear(input, self.weight, self.bias)
        device = input.device.type
        tensors: list[Any] = [input, self.weight, self.bias]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = [None if t is None else t.to(dtype) for t in tensors]
        x, weight, bias = tensors
        if x.dtype == torch.float16:
            # A scaler multiplies the loss before its backward; gradients that are made with the
            # loss would have underflowed by then.
            return F.linear(x, weight, bias)
        seen = 0 if backwards is None else backwards.count
        head = Head(x, weight, bias, loss, Transform(), weight._version, backwards, seen)
        return DeferredLogits.defer(head)

    return forward

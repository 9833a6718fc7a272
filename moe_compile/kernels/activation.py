"""The weighed activation between two expert products, as one kernel each way.

    out = activation(x) * weight

An activation is an FX graph of rows, known by a key, since an operator takes no functions.
"""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.kernels.activation_source import ActivationSource, activation_source
from moe_compile.kernels.visible import Wrap, as_it_is, show_kernels

_GRAPHS: dict[str, fx.Graph] = {}
"""Every activation that was captured, by its key."""


def register(graph: fx.Graph) -> str:
    """The key of an activation, the same in every process."""
    text = "; ".join(f"{n.name} = {n.target}{n.args}{n.kwargs or ''}" for n in graph.nodes)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if key not in _GRAPHS:
        _GRAPHS[key] = _without_values(graph)
    return key


def _without_values(graph: fx.Graph) -> fx.Graph:
    """A copy without the fake values, which hold on to all of the capture that they are from."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        node.meta.clear()
    return copy


@torch.compiler.assume_constant_result  # Dynamo runs it while it traces
def is_fusable(key: str, width: int) -> bool:
    """Whether there are kernels for an activation of rows of `width`."""
    return _source(key, width) is not None


@functools.cache
def _source(key: str, width: int) -> ActivationSource | None:
    # A thread of its own has none of the modes and hooks that a caller may be under.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(activation_source, _GRAPHS[key], width).result()


@torch.library.custom_op("moe_compile::activate", mutates_args=())
def activate(x: Tensor, weight: Tensor, offs: Tensor, key: str) -> Tensor:
    """Args: x: [R, N]. weight: [R, 1]. offs: the last ends the rows. key: of a fusable activation.

    Returns: [R, I] in x's dtype, fresh and contiguous, rounded once; from offs[-1] on it may hold
    anything, and so may the gradients.
    """
    if x.is_cuda and x.dtype != torch.float64:
        return _forward_on_gpu(x, weight, offs, key)
    return (_run(key, x) * weight).to(x.dtype)


@torch.library.custom_op("moe_compile::activate_backward", mutates_args=())
def activate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offs: Tensor, key: str, again: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, [R, N], and of weight, [R, 1]; grad is [R, I].

    And, if `again`, the result once more, for whoever did not keep it; else nothing.
    """
    if x.is_cuda and x.dtype != torch.float64:
        return _backward_on_gpu(grad, x, weight, offs, key, again)
    out, pull_back, *_ = torch.func.vjp(lambda x: _run(key, x), x)
    grad_weight = (out * grad).sum(1, keepdim=True).to(weight.dtype)
    grad_x = pull_back((grad * weight).to(x.dtype))[0].contiguous()
    return grad_x, grad_weight, (out * weight).to(x.dtype) if again else x.new_empty(0, 0)


def _known(key: str, x: Tensor) -> ActivationSource:
    source = _source(key, int(x.shape[1]))
    assert source is not None, "the caller has asked is_fusable"
    return source


def _run(key: str, x: Tensor) -> Tensor:
    result: Tensor = fx.GraphModule({}, _GRAPHS[key])(x)
    return result


def _forward_on_gpu(
    x: Tensor, weight: Tensor, offs: Tensor, key: str, *, wrap: Wrap = as_it_is
) -> Tensor:
    from moe_compile.kernels import activation_kernels  # needs Triton

    return activation_kernels.forward(_known(key, x), x, weight, offs, wrap=wrap)


def _backward_on_gpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    key: str,
    again: bool = False,
    *,
    wrap: Wrap = as_it_is,
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_compile.kernels import activation_kernels

    return activation_kernels.backward(_known(key, x), grad, x, weight, offs, again, wrap=wrap)


show_kernels(activate, _forward_on_gpu)
show_kernels(activate_backward, _backward_on_gpu)


@activate.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor, key: str) -> Tensor:
    return x.new_empty(x.shape[0], _known(key, x).width)


@activate_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offs: Tensor, key: str, again: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    result = x.new_empty(grad.shape if again else (0, 0))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), result


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_x, grad_weight, _ = activate_backward(grad, *ctx.saved_tensors, ctx.key)
    return grad_x, grad_weight, None, None


activate.register_autograd(_backward, setup_context=_save)

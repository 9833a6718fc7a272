"""Forward and backward of a training step as one CUDA graph, which the CPU starts in one call.

step = moe_compile.GraphedStep(model)  # after optimize
...
loss = step(input_ids=ids, labels=ids)
optimizer.step()
optimizer.zero_grad()

Source: torch's "Whole-network capture", https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

import contextlib
from collections.abc import Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_compile.adapters import transformers as hf
from moe_compile.config import CONFIG, OptimizeConfig
from moe_compile.install.count_picks import COUNTS
from moe_compile.optimize import report

_WARMUP = 3
"""Steps before a capture: they compile, and make what libraries keep from their first calls."""

_TOLERANCE = 0.01
"""How far the graph's loss and norm of all gradients may be from the ordinary step's, relative."""

Grads = list[tuple[nn.Parameter, Tensor]]


class GraphedStep:
    """Forward and backward of whole rows of tokens, captured once for every shape of a batch.

    Equal to `model(**batch, use_cache=False).loss.backward()`: gradients are added to those that
    there are. The first call of a shape runs ordinary steps, captures one, and compares the two.
    What the host decides in a step, or counts, is decided once, at the capture; what a step reads,
    parameters and buffers, must stay where it is in memory.

    Args:
        model: what `optimize` returned, on CUDA, with transformers' attention `sdpa`. On several
            ranks experts need DeepEP and `max_tokens_per_rank`, as any other dispatch waits for the
            device, and FSDP2 `fsdp={"reshard_after_forward": False}`: nothing else was seen to work
            in a graph. All ranks call a step, with batches of one shape.

    Raises:
        ValueError: for another model.
    """

    def __init__(self, model: nn.Module) -> None:
        _check_ranks(model)
        kind = hf.attention_kind(model)
        device = next(model.parameters()).device
        if kind != "sdpa" or device.type != "cuda":
            raise ValueError(
                f"GraphedStep got a model on {device} with the attention {kind!r}; it takes one on "
                "cuda with 'sdpa', which needs no mask for whole rows; move it, or load it with "
                "attn_implementation='sdpa'"
            )
        self._model, self._device = model, device
        self._graphs: dict[Hashable, _Captured] = {}

    def __call__(self, **batch: Tensor) -> Tensor:
        """The loss of a batch, whose gradients are in the parameters' `grad`.

        Args:
            batch: tensors on the model's device: `input_ids`, `labels`, and others that its forward
                takes, such as `num_items_in_batch`; no mask and no positions.

        Raises:
            ValueError: for another batch, or a model that needs a mask for whole rows.
            RuntimeError: if the step waits for the device, or the graph computes something else.
        """
        _check(batch, self._device)
        forms = tuple((name, t.shape, t.dtype) for name, t in sorted(batch.items()))
        key = self._model.training, forms
        if key not in self._graphs:
            self._graphs[key] = _capture(self._model, batch)
        return self._graphs[key].replay(batch)


@dataclass(frozen=True)
class _Captured:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    loss: Tensor
    grads: Grads

    def replay(self, batch: dict[str, Tensor]) -> Tensor:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        before = [g.clone() if p.grad is g else p.grad for p, g in self.grads]
        self.graph.replay()
        for (parameter, grad), held in zip(self.grads, before, strict=True):
            parameter.grad = grad if held is None else held.add_(grad)
        return self.loss.clone()


def _check_ranks(model: nn.Module) -> None:
    found = report(model)
    config: OptimizeConfig = getattr(model, CONFIG)
    waits = found.dispatchers and (
        "all_to_all" in found.dispatchers or config.max_tokens_per_rank is None
    )
    gathers = found.mesh and not (config.fsdp is False or _stays_gathered(config.fsdp))
    if waits or gathers:
        raise ValueError(
            f"GraphedStep got a model on {found.mesh} whose tokens travel by "
            f"{list(found.dispatchers)}, with max_tokens_per_rank={config.max_tokens_per_rank} and "
            f"fsdp={config.fsdp!r}; on several ranks it takes DeepEP that does not wait for the "
            "device, and parameters that stay gathered until the backward; pass OptimizeConfig("
            'max_tokens_per_rank=..., fsdp={"reshard_after_forward": False}) to optimize'
        )


def _stays_gathered(fsdp: Any) -> bool:
    return isinstance(fsdp, Mapping) and fsdp.get("reshard_after_forward") is False


def _check(batch: dict[str, Any], device: torch.device) -> None:
    wrong = {
        name: getattr(value, "device", type(value).__name__)
        for name, value in batch.items()
        if not isinstance(value, Tensor) or value.device != device
    }
    if wrong:
        raise ValueError(
            f"GraphedStep got {wrong}; it takes tensors on {device}: a number would be that of the "
            "capture for ever; make it a tensor, and move it there"
        )
    masks = {"attention_mask", "position_ids"} & batch.keys()
    if masks or "labels" not in batch:
        raise ValueError(
            f"GraphedStep got {sorted(batch)}; it takes input_ids and labels of whole rows, "
            "without masks and positions; call the model itself on padded or packed rows"
        )


def _capture(model: nn.Module, batch: dict[str, Tensor]) -> _Captured:
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    stream = torch.cuda.Stream()
    with _as_before(model) as start:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = _ordinary(model, batch)
            with hf.without_masks(model):
                for _ in range(_WARMUP):
                    _step(model, batch)
                    model.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)
        captured = _record(model, batch, stream)
        torch.cuda.set_rng_state(start)  # with dropout, the ordinary step's numbers
        captured.graph.replay()
        _compare(expected, _measured(captured.loss, captured.grads))
    return captured


def _record(model: nn.Module, batch: dict[str, Tensor], stream: torch.cuda.Stream) -> _Captured:
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread asks for events at any time, which another mode would not allow.
    mode = "thread_local"
    try:
        with (
            hf.without_masks(model),
            torch.cuda.graph(graph, stream=stream, capture_error_mode=mode),
        ):
            loss = _step(model, batch)
    except RuntimeError as error:
        raise RuntimeError(
            "GraphedStep could not capture this model's step: something in it waits for the "
            "device, as all_to_all does in every layer, and DeepEP without max_tokens_per_rank; "
            f"call the model itself: {error}"
        ) from error
    return _Captured(graph, batch, loss, _grads(model))


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def _ordinary(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """What a step is that transformers makes masks for, if there should be any."""
    hooks = [
        layer.register_forward_pre_hook(partial(_refuse_mask, name), with_kwargs=True)
        for name, layer in _layers(model)
    ]
    try:
        loss = _step(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = _measured(loss, _grads(model))
    model.zero_grad()
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a number for a name."""
    for name, module in model.named_modules():
        *above, last = name.split(".")
        if last.isdigit() and not any(part.isdigit() for part in above):
            yield name, module


def _refuse_mask(name: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if mask is not None:
        raise ValueError(
            f"GraphedStep got a model whose layer {name} needs a mask for whole rows: a "
            f"{type(mask).__name__}, for a window or chunks; it takes models whose attention is "
            "causal and no more; call the model itself"
        )


def _grads(model: nn.Module) -> Grads:
    return [(p, p.grad) for p in model.parameters() if p.grad is not None]


def _measured(loss: Tensor, grads: Grads) -> tuple[float, float]:
    """The loss, and the norm of this rank's gradients."""
    local = [g.to_local() if isinstance(g, DTensor) else g for _, g in grads]
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in local])
    return loss.item(), torch.linalg.vector_norm(norms).item()


def _compare(expected: tuple[float, float], got: tuple[float, float]) -> None:
    for name, a, b in zip(("loss", "norm of gradients"), expected, got, strict=True):
        if not abs(a - b) <= _TOLERANCE * abs(a):
            raise RuntimeError(
                f"GraphedStep: the captured step's {name} is {b:.6g}, the model's own {a:.6g}, of "
                "the same batch; call the model itself, and please report the model"
            )


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Generator[Tensor]:
    """Puts back gradients, buffers, counts of picks and the generator's state, which it yields."""
    held = [(p, p.grad) for p in model.parameters()]
    counts = [c for module in model.modules() for c in vars(module).get(COUNTS, ())]
    kept = [(t, t.clone()) for t in (*model.buffers(), *counts)]
    state = torch.cuda.get_rng_state()
    model.zero_grad()
    try:
        yield state
    finally:
        for parameter, grad in held:
            parameter.grad = grad
        for tensor, value in kept:
            tensor.copy_(value)
        torch.cuda.set_rng_state(state)

"""Hands every layer to `torch.compile`, so that depth, lengths and caches do not recompile it.

Dynamo keeps what it compiled for each code object and gives up after eight versions. All layers
of one class share one code object, so each group gets its own copy of the entry point, and each
way of calling it (training, gradients, masks) too. Calls with a cache, whose shapes change with
every token, run uncompiled, and so do layers that Dynamo cannot trace, with a warning. Only
`forward` is compiled: hooks on the layer itself stay outside.
"""

import logging
import types
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from moe_compile.adapters import transformers as hf
from moe_compile.capture.group import Group
from moe_compile.config import OptimizeConfig
from moe_compile.install.forward import bind
from moe_compile.install.guards import foreign_guards
from moe_compile.install.own_code import with_own_code
from moe_compile.install.recompute import recomputing

_LOG = logging.getLogger(__name__)


def compile_units(
    model: nn.Module, groups: list[Group], config: OptimizeConfig, device: torch.device
) -> None:
    """Compiles the layers of every group, for the device on which the model will train.

    What they recompute in the backward is part of what is compiled, so that the partitioner sees
    it. What is beside the layers stays as it is.
    """
    options, mode = compile_options(config, device), config.activation_checkpointing
    for number, group in enumerate(groups):
        if is_layer(group) and (options is not None or mode != "none"):
            layers = [model.get_submodule(name) for name in group.names]
            _change_layers(layers, number, options, mode)


def compile_options(config: OptimizeConfig, device: torch.device) -> dict[str, Any] | None:
    """The options with which layers are compiled; None where they are not."""
    if config.compile is False or (config.compile == "auto" and device.type != "cuda"):
        return None
    options = {} if isinstance(config.compile, (bool, str)) else dict(config.compile)
    if config.deterministic and options.get("backend", "inductor") == "inductor":
        # Inductor times tilings while the model runs, and each sums in another order.
        options["options"] = {"deterministic": True} | options.get("options", {})
    return {"fullgraph": True} | options


def is_layer(group: Group) -> bool:
    """Whether a group is of whole layers; what is beside them is not compiled."""
    return not group.is_part and any(n.rpartition(".")[2].isdigit() for n in group.names)


def _change_layers(
    layers: list[nn.Module], number: int, options: dict[str, Any] | None, mode: str
) -> None:
    inner = vars(layers[0]).get("forward")
    function = type(layers[0]).forward if inner is None else getattr(inner, "__func__", None)
    if not isinstance(function, types.FunctionType):
        _LOG.warning("a %s has a forward of its own and stays as it is", type(layers[0]).__name__)
        return
    if mode != "none":
        # What a layer records, as router logits, it records once: the backward has no use for it.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        function = recomputing(function, mode)
    entry = function if options is None else _entry(function, number, options)
    for layer in layers:
        bind(layer, entry)


def _entry(
    function: types.FunctionType, number: int, options: dict[str, Any]
) -> Callable[..., Any]:
    """A forward that compiles `function` once for every way in which it is called."""
    compiled: dict[Hashable, Callable[..., Any]] = {}
    untraceable = WeakSet[nn.Module]()

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        way = _way(self, args, kwargs)
        if way is None or self in untraceable:
            return function(self, *args, **kwargs)
        if way not in compiled:
            name = f"{function.__name__}_{number}_{len(compiled)}"
            compiled[way] = _compiled(with_own_code(function, name), options)
        try:
            with hf.recording_inside():
                return compiled[way](self, *args, **kwargs)
        except Unsupported as error:
            if not untraceable:
                _warn_about_code(self, error)
            untraceable.add(self)
        return function(self, *args, **kwargs)

    return forward


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`torch.compile`, which takes a mode or options of its own; those that it gets are its own."""
    if "mode" in options:
        return torch.compile(function, **options)
    inner = {"guard_filter_fn": foreign_guards} | options.get("options", {})
    return torch.compile(function, **options | {"options": inner})


def _way(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What changes the compiled code beyond sizes; None for a call that stays uncompiled."""
    try:
        kinds = _kind(args), _kind(kwargs)
    except _Opaque:
        if layer.training:
            _warn_about_cache()
        return None
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    device = "cpu" if first is None else first.device.type
    return layer.training, torch.is_grad_enabled(), torch.is_autocast_enabled(device), kinds


class _Opaque(Exception):
    """An argument, such as a cache, whose inside may change with every call."""


def _kind(value: Any) -> Hashable:
    """An argument without the values in its tensors; this runs in every call of every layer."""
    if isinstance(value, Tensor):
        return value.dtype
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    if isinstance(value, dict):
        return tuple((name, _kind(inner)) for name, inner in value.items())
    raise _Opaque


def _warn_about_code(layer: nn.Module, error: Exception) -> None:
    """What was put into a layer afterwards, such as LoRA on expert weights, may be untraceable."""
    _LOG.warning(
        "a %s runs uncompiled: torch.compile cannot trace it: %s",
        type(layer).__name__,
        " ".join(str(error).splitlines()[:2]),
    )


def _warn_about_cache() -> None:
    global _warned
    if not _warned:
        _warned = True
        _LOG.warning(
            "a layer was trained with a key-value cache, so it ran uncompiled; "
            "pass use_cache=False to the model, or set model.config.use_cache = False"
        )


_warned = False

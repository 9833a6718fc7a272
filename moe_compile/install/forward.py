"""The installed forward: captured variants first, the module's own code last."""

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_compile import ops
from moe_compile.capture.trace import Mode
from moe_compile.capture.untouched import OfKind
from moe_compile.install.count_picks import counted
from moe_compile.install.cut import Cut
from moe_compile.install.emit import emit
from moe_compile.install.form import CallForm
from moe_compile.install.guards import EMITTED
from moe_compile.parallel.experts import own_experts, own_weights, scale_gradient
from moe_compile.parallel.limits import limit_picks, limit_places
from moe_compile.rewrite.refuse import Refuse

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One captured call form of a module and the function that serves it.

    Attributes:
        fits: answers whether the sizes are among those that the capture holds for, or None.
        crossed: children that the function does not call, with the class that each must still be.
        reads: attributes that the captured code read, of the module (path "") and of crossed
            children, with the values that they must still have.
        alone: the function drops outputs, so nobody may listen to the module's.
        weights: names of the parameters that several ranks share out, seen from the module.
        collective: the function holds collectives, so the module has no other path.
    """

    form: CallForm
    run: Callable[..., Any]
    fits: Callable[..., tuple[bool, ...]] | None
    crossed: tuple[tuple[str, type[nn.Module]], ...]
    reads: tuple[tuple[str, str, Any], ...]
    alone: bool
    weights: tuple[str, ...] = ()
    collective: bool = False

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...] | None:
        """The tensors to run on, or None when the call is of another form."""
        if not _is_ambient(self.form.mode, module, self.form.device):
            return None
        if self.alone and module._forward_hooks:
            return None
        if not all(_is_plain(module, *child) for child in self.crossed):
            return None
        if not all(_still_reads(module, *read) for read in self.reads):
            return None
        tensors = self.form.tensors(args, kwargs)
        if tensors is None:
            return None
        if self.fits is not None and not all(self.fits(*tensors)):
            return None
        return tensors


def variant(cut: Cut, mode: Mode, reads: dict[tuple[str, str], Any], owner: nn.Module) -> Variant:
    """The variant of a cut call for modules like `owner`; `reads` are those of its capture."""
    placeholders = [node for node in cut.graph.nodes if node.op == "placeholder"]
    name = (cut.path.rpartition(".")[2] or "layer").replace("-", "_")
    name = f"{cut.call.label}_{name}" if name.isdigit() else name
    return Variant(
        CallForm.of(cut.call, placeholders, mode),
        emit(counted(cut.graph), f"{name}_forward"),
        None if cut.conditions is None else emit(cut.conditions, f"{name}_fits", method=False),
        tuple((path, type(owner.get_submodule(path))) for path in cut.crossed),
        _own_reads(cut, reads),
        cut.drops_outputs,
        shared_weights(cut.graph),
        any(node.meta.get("op") in ops.SENDS for node in cut.graph.nodes),
    )


def shared_weights(graph: fx.Graph) -> tuple[str, ...]:
    """The parameters of which each rank has its own part: those of dispatched experts."""
    spread = [node for node in graph.nodes if "data_ranks" in node.meta]
    used = [weight for node in spread for weight in own_weights(node.kwargs).values()]
    return tuple(dict.fromkeys(str(node.target) for node in used))


_OF_RANKS = (own_experts, scale_gradient, limit_picks, limit_places)
"""What one rank that has every expert does without: each would be the first thing that it takes."""


def on_one_rank(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function without its collectives, for a rank that has every expert."""
    alone = fx.Graph()
    alone.output(alone.graph_copy(graph, {}))
    for node in list(alone.nodes):
        if node.meta.get("op") in ops.JOURNEYS:
            node.target = node.meta["op"].reference
        if node.target in _OF_RANKS:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            alone.erase_node(node)
    return emit(alone, name)


def _own_reads(cut: Cut, reads: dict[tuple[str, str], Any]) -> tuple[tuple[str, str, Any], ...]:
    """The plain values that the cut code read, seen from the owner.

    The mode is part of the call form; configs and other objects are compared by grouping.
    """
    prefix = f"{cut.path}." if cut.path else ""
    inlined = {cut.path: "", **{f"{prefix}{child}": child for child in cut.crossed}}
    plain = (bool, int, float, str, type(None), torch.dtype, OfKind)
    return tuple(
        (inlined[where], name, value)
        for (where, name), value in reads.items()
        if where in inlined and name != "training" and isinstance(value, plain)
    )


def check_replaceable(owner: nn.Module, crossed: tuple[str, ...]) -> None:
    """Refuses a module whose forward, or a crossed child's, is not its class's own."""
    for module in (owner, *map(owner.get_submodule, crossed)):
        if "forward" in vars(module):
            raise Refuse(f"{type(module).__name__} has a forward of its own already")
    for child in map(owner.get_submodule, crossed):
        if not _is_plain(owner, "", type(child), child):
            raise Refuse(f"{type(child).__name__}, which would no longer be called, carries hooks")


def make_forward(original: Callable[..., Any], variants: tuple[Variant, ...]) -> Callable[..., Any]:
    """A function to bind to modules of one class; it looks like `original` to `inspect`."""

    is_shared = any(candidate.collective for candidate in variants)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for candidate in variants:
            tensors = candidate.inputs(self, args, kwargs)
            if tensors is not None:
                return candidate.run(self, *tensors)
        if is_shared:
            raise RuntimeError(_no_other_path(type(self).__name__))
        if self.training:
            _warn_of_fallback(type(self).__name__)
        return original(self, *args, **kwargs)

    forward.__code__ = forward.__code__.replace()  # an object of its own, by which Dynamo knows it
    functools.update_wrapper(forward, original)
    forward.__dict__[EMITTED] = True
    return forward


def _no_other_path(kind: str) -> str:
    return (
        f"{kind} was called in a form that was not captured; its experts are spread over ranks, so "
        "it cannot run its own code; call it in the dtype and autocast that it was optimized for, "
        "without hooks inside it, and put LoRA in before optimize"
    )


@torch.compiler.assume_constant_result  # Dynamo runs it while it traces
def _warn_of_fallback(kind: str) -> None:
    if kind in _warned:
        return
    _warned.add(kind)
    _LOG.warning(
        "%s runs its own code in training: it is called in a form that was not captured. The usual "
        "cause is a key-value cache: pass use_cache=False to the model",
        kind,
    )


_warned = set[str]()


def bind(module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes `function` the module's forward; a deep copy of the module binds its own copy."""
    module.forward = types.MethodType(function, module)


def _is_ambient(mode: Mode, module: nn.Module, device: str) -> bool:
    enabled = torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if enabled else None
    return mode.training in (None, module.training) and autocast == mode.autocast


def _still_reads(module: nn.Module, path: str, name: str, value: Any) -> bool:
    now = getattr(module.get_submodule(path) if path else module, name, None)
    if isinstance(value, OfKind):
        return type(now) is value.kind
    return type(now) is type(value) and now == value


def _is_plain(
    module: nn.Module, path: str, kind: type[nn.Module], child: nn.Module | None = None
) -> bool:
    """Whether a child that is no longer called still does what its class does, and only that."""
    child = module.get_submodule(path) if child is None else child
    hooks = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks
    return type(child) is kind and not hooks and not child._backward_pre_hooks

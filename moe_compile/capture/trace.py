"""One graph per kind of unit: traced before autograd, functional, with module boundaries.

The tracer is `make_fx` on fake tensors with symbolic batch and sequence: it takes a fraction of a
second where `torch.export` takes several, keeps `linear`, `softmax` and
`scaled_dot_product_attention` whole, and sees the same Python as the model runs.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx import _lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from moe_compile.adapters import transformers as hf
from moe_compile.capture.boundary import Attribute, CallLog, ModuleCall, enter, exit
from moe_compile.capture.every_expert import RandomExperts, traceable
from moe_compile.capture.probe import Call
from moe_compile.capture.quick_nodes import quick_nodes
from moe_compile.capture.shadow import Shadow
from moe_compile.capture.source import recorded_lines
from moe_compile.capture.unchanged import Unchanged
from moe_compile.capture.untouched import KINDS, Touched, Untouched, UntouchedAttribute
from moe_compile.capture.wrapping import untraced_wrapping

_ASSERTS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
_SIZES = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_stride.int,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_storage_offset.default,
}


_lazily: Any = getattr(_lazy_graph_module, "_use_lazy_graph_module", contextlib.nullcontext)
"""In it, no Python is written for a traced graph, which nobody runs."""


class HoldsTensors(Exception):
    """The code reads tensors from an argument, or leaves them there."""


@dataclass(frozen=True)
class Mode:
    """What a capture holds for: training, evaluation or both (None), and autocast's dtype."""

    training: bool | None = True
    autocast: torch.dtype | None = None


@dataclass
class Capture:
    """The graph of one unit in one mode.

    Attributes:
        graph: aten ops over `get_attr` nodes (parameters, by their name inside the unit), with an
            `enter` and an `exit` node around every submodule call. `node.meta["val"]` is the fake
            value, `node.meta["calls"]` the calls that the node lies in, outermost first,
            `node.meta["function"]` the custom autograd function that it lies in, or None, and
            `node.meta["source"]` the line of the model's source that it comes from.
        calls: the calls; number 0 is the unit itself.
        reads: the attributes that decide whether another unit may share this capture.
    """

    graph: fx.Graph
    calls: list[ModuleCall]
    reads: dict[Attribute, Any]
    mode: Mode


def trace(
    shadow: Shadow,
    unit: nn.Module,
    call: Call,
    mode: Mode,
    matters: set[str],
    *,
    observed: bool = True,
    hidden: Iterable[Attribute] = (),
) -> Capture:
    """Traces `unit`, a module of the shadow, as `call` calls it.

    Args:
        matters: collects the names of flags that the unit's code looks at: they keep their values.
        observed: whether somebody may use every output of the unit.
        hidden: attributes of the unit and of modules in it that the capture must hold for any
            value of.

    Raises:
        TouchedAttribute: the code looked at a hidden attribute.
    """
    stores, call = call.stores(), call.without_stores()
    sampled = False
    while True:
        try:
            with Unchanged(unit) as before:
                _hide(unit, hidden)
                own = _without_values(unit, call, matters)
                capture = _trace(shadow, unit, own, mode, before, sampled=sampled)
            for node in capture.graph.nodes:
                if node.target is exit:
                    node.meta["observed"] = observed and node.args[0] == 0
            return capture
        except Touched as touched:
            if any(type(store).__name__ == touched.name for store in stores):
                raise HoldsTensors(f"it keeps tensors in a {touched.name}") from touched
            matters.add(touched.name)
        except RandomExperts:  # nothing will match them: a few say where they draw
            sampled = True


def _hide(unit: nn.Module, hidden: Iterable[Attribute]) -> None:
    """Puts stand-ins where attributes are whose values may not matter."""
    for path, name in hidden:
        attributes = vars(unit.get_submodule(path))
        kind = type(attributes.get(name))
        if kind in KINDS:
            attributes[name] = UntouchedAttribute(path, name, kind)


def _without_values(unit: nn.Module, call: Call, matters: set[str]) -> Call:
    """The call with stand-ins for its flags, and for those that could be handed through."""
    kwargs = dict(call.kwargs)
    if _takes_any_keyword(unit):
        kwargs = dict.fromkeys(hf.HANDED_THROUGH, False) | kwargs
    for name, value in kwargs.items():
        if isinstance(value, (bool, int, float, str)) and name not in matters:
            kwargs[name] = Untouched(name)
    kept = {n: v for n, v in kwargs.items() if n in call.kwargs or n not in matters}
    return Call(call.args, kept)


def _takes_any_keyword(unit: nn.Module) -> bool:
    parameters = inspect.signature(unit.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _trace(
    shadow: Shadow, unit: nn.Module, call: Call, mode: Mode, before: Unchanged, *, sampled: bool
) -> Capture:
    names, tensors = _state(unit)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    log = CallLog(unit)

    def run(state: list[Tensor], inputs: list[Tensor]) -> Any:
        filled = list(leaves)
        for i, tensor in zip(where, inputs, strict=True):
            filled[i] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        # Where experts have dropout a few of them do: see `trace`.
        able = traceable(
            unit, assumed=log.assume, left_out=log.sample, sampled=sampled, drops=sampled
        )
        with log.recording(), able, autocast(mode, shadow.device), recorded_lines():
            values = dict(zip(names, state, strict=True))
            result = torch.func.functional_call(unit, values, args, kwargs, tie_weights=False)
        for name in [name for name, tensor in values.items() if _is_written(tensor)]:
            path, _, attribute = name.rpartition(".")
            log.leave(path, [attribute])
        return result

    unit.train(mode.training is not False)
    shadow.forget_pending_sizes()
    with shadow.mode, enable_python_dispatcher():
        module = _functional(run, tensors, [leaves[i] for i in where])
    for path, inner in unit.named_modules():
        log.leave(path, before.left_on(inner))
    graph = _with_boundaries(module.graph, names)
    for node in graph.nodes:
        functions = [log.calls[i].label for i in node.meta["calls"] if log.calls[i].path is None]
        node.meta["function"] = functions[0] if functions else None
    return Capture(graph, log.calls, log.reads, mode)


def _is_written(tensor: Any) -> bool:
    """Whether a parameter or a buffer was changed in place."""
    return bool(torch._functionalize_has_data_mutation(tensor.elem))  # type: ignore[attr-defined]


def trace_function(function: Callable[..., Any], inputs: list[Any]) -> fx.Graph:
    """The functional graph of a plain torch function over tensors of one fake mode."""

    def run(state: list[Tensor], values: list[Any]) -> Any:
        with traceable():
            return function(*values)

    with enable_python_dispatcher():
        return _functional(run, [], inputs).graph


def _functional(run: Callable[..., Any], state: list[Tensor], inputs: list[Any]) -> fx.GraphModule:
    """Traces with in-place operations made functional, composite operators kept whole."""
    functional = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True))
    with quick_nodes(), untraced_wrapping(), _lazily(True):
        module = _make_fx(functional)(state, inputs)
    for node in list(module.graph.nodes):
        if node.target in _ASSERTS:
            module.graph.erase_node(node)
    return module


def _make_fx(function: Callable[..., Any]) -> Callable[..., fx.GraphModule]:
    return make_fx(function, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)


def _state(unit: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Parameters and buffers by name; a tied tensor once, by its first name."""
    named = [*unit.named_parameters(), *unit.named_buffers()]
    return [name for name, _ in named], [tensor for _, tensor in named]


@contextlib.contextmanager
def autocast(mode: Mode, device: torch.device) -> Generator[None]:
    """The autocast of a mode on a device; nothing where the mode has none."""
    if mode.autocast is None:
        yield
        return
    with torch.autocast(device.type, dtype=mode.autocast):
        yield


def _with_boundaries(traced: fx.Graph, names: list[str]) -> fx.Graph:
    """Parameters become `get_attr`, and every node learns which calls it lies in."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    open_calls: list[int] = []
    placeholders = [node for node in traced.nodes if node.op == "placeholder"]
    state = dict(zip(placeholders, names, strict=False))
    sizes: dict[Any, fx.Node] = {}
    for node in traced.nodes:
        if node.target is enter:
            open_calls.append(node.args[0])
        if node in state:
            env[node] = graph.create_node("get_attr", state[node], name=node.name)
        elif node.target is torch.ops.aten.sym_numel.default:
            env[node] = _elements(graph, env[node.args[0]], sizes)
            continue
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {"val": node.meta.get("val"), "source": node.meta.get("source")}
        env[node].meta["calls"] = _calls(env[node], open_calls)
        for size in _symbolic_sizes(node.meta.get("val")):
            sizes.setdefault(size.node.expr, env[node])
        if node.target is exit:
            assert open_calls.pop() == node.args[0], "module calls must nest"
    return graph


def _symbolic_sizes(value: Any) -> list[torch.SymInt]:
    sizes: list[Any] = list(value.shape) if isinstance(value, Tensor) else []
    return [size for size in sizes if isinstance(size, torch.SymInt)]


def _elements(graph: fx.Graph, tensor: fx.Node, sizes: dict[Any, fx.Node]) -> Any:
    """The number of elements, as a product: of sizes of the tensors that first had them.

    Torch has one symbol for it, which it reads off the first tensor with as many: one whose values
    a rewrite may drop.
    """
    known: int = 1
    factors: list[fx.Node] = []
    for size in tensor.meta["val"].shape:
        if isinstance(size, int):
            known *= size
            continue
        source = sizes[size.node.expr]
        dims = [str(other) for other in source.meta["val"].shape]
        factors.append(
            graph.call_function(torch.ops.aten.sym_size.int, (source, dims.index(str(size))))
        )
        factors[-1].meta = dict(source.meta) | {"val": size}
    result: Any = known if known != 1 or not factors else factors.pop(0)
    for factor in factors:
        product = _value(result) * _value(factor)
        result = graph.call_function(operator.mul, (result, factor))
        result.meta = dict(factor.meta) | {"val": product}
    return result


def _value(number: Any) -> Any:
    return number.meta["val"] if isinstance(number, fx.Node) else number


def _calls(node: fx.Node, open_calls: list[int]) -> tuple[int, ...]:
    """The calls that a node lies in; a size lies where its tensor does, whoever asks first."""
    if node.target in _SIZES:
        (tensor,) = node.all_input_nodes
        return tensor.meta["calls"]
    return tuple(open_calls)

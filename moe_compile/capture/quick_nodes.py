"""A short way to trace an operator whose result is known: a node, and a tensor of its form.

Torch takes milliseconds for each operator of a trace, whatever it is: functionalization and the
tracer both look through its arguments and take notes that nobody reads, and its result's sizes are
computed anew. A loop over experts has thousands of operators that were traced for another expert
before. What torch did once it is not asked to do again: where a result's form is known, the node
is made at once.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import return_and_correct_aliasing

from moe_compile.capture.remembering_mode import RememberingMode
from moe_compile.capture.tensor_form import DESCRIBES, PLAIN, Form, Formless
from moe_compile.capture.view_forms import VIEWS

_ODD = {"_unsafe_view", "dropout", "lift", "lift_fresh", "lift_fresh_copy", "is_nonzero"}
"""Operators that torch traces in ways of their own."""

_COUNTED = {torch.ops.aten.nonzero.default, torch.ops.aten.where.default}

_ODD_TAGS = {torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}

_torch: Any = torch

_NAMES = (
    (proxy_tensor, "_ProxyTensor disable_proxy_modes_tracing get_proxy_mode get_proxy_slot"),
    (proxy_tensor, "_set_unbacked_bindings track_tensor"),
    (torch, "_disable_functionalization _from_functional_tensor _to_functional_tensor"),
    (torch, "_functionalize_commit_update _functionalize_enable_reapply_views"),
    (torch, "_functionalize_replace _functionalize_sync"),
    (torch._C, "_ForceDispatchKeyGuard _dispatch_tls_local_exclude_set"),
    (torch._C, "_dispatch_tls_local_include_set"),
    (FunctionalTensor, "_extra_dispatch_keys"),
)
"""Torch's own names, which another release may lack: there it only takes longer."""

_FUNCTIONALIZE = torch._C.DispatchKey.Functionalize


class _Unknown(Exception):
    """An operator, or a value, that only torch knows how to trace."""


@contextlib.contextmanager
def quick_nodes() -> Generator[None]:
    """In it, operators are traced the short way where there is one."""
    if not all(hasattr(owner, name) for owner, names in _NAMES for name in names.split()):
        yield
        return
    functional: Any = FunctionalTensorMode.__torch_dispatch__
    traced: Any = ProxyTorchDispatchMode.__torch_dispatch__
    tracers: dict[Any, _Quick] = {}

    def quick(mode: Any) -> _Quick:
        if mode is None or not mode.pre_dispatch:
            raise _Unknown
        if mode.tracer not in tracers:
            tracers[mode.tracer] = _Quick(mode.tracer)
        return tracers[mode.tracer]

    def dispatch_functional(
        mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        done = functools.partial(functional, mode, func, types, args, kwargs)
        with contextlib.suppress(_Unknown, Formless):
            way = quick(proxy_tensor.get_proxy_mode())
            if func in VIEWS and not kwargs:
                return _viewed(mode, func, args)
            if func in way.direct:
                return way.functional(mode, func, args, kwargs or {})
            target = _functional(func)
            if target is not None:
                given = way.arguments(_unwrapped(args), _unwrapped(kwargs or {}))
                result = done()
                way.direct[func] = target if way.is_made(result, target, given) else None
                return result
        return done()

    def dispatch_traced(
        mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        done = functools.partial(traced, mode, func, types, args, kwargs)
        with contextlib.suppress(_Unknown, Formless):
            way = quick(mode)
            if _is_plain(func):
                return way.traced(done, func, args, kwargs or {})
        return done()

    with (
        mock.patch.object(FunctionalTensorMode, "__torch_dispatch__", dispatch_functional),
        mock.patch.object(ProxyTorchDispatchMode, "__torch_dispatch__", dispatch_traced),
    ):
        yield


class _Quick:
    """The short ways of one trace.

    Attributes:
        tracer: what makes its nodes.
        direct: the operators that functionalization hands on as they are, and those in place, each
            with the one that it makes of it; None for one of which it makes something else.
        tracked: the forms whose sizes the tracer knows.
    """

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self.direct: dict[Any, Any] = {}
        self.tracked: set[Form] = set()

    def functional(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """What code gets of an operator that functionalization hands on."""
        target = self.direct[func]
        if target is None:
            raise _Unknown
        inner, options = _unwrapped(args), _unwrapped(kwargs)
        calls = _mode(inner).calls
        with proxy_tensor.disable_proxy_modes_tracing():
            form = calls.result(target, inner, options)
        if not isinstance(form, Form):
            raise _Unknown
        if target is func:
            result = self._node(target, inner, options, form)
            return FunctionalTensor(_torch._to_functional_tensor(result), mode)
        if calls.forms.of(inner[0]) is not form:
            raise _Unknown
        whole = args[0].elem
        _torch._functionalize_replace(whole, self._node(target, inner, options, form))
        _torch._functionalize_commit_update(whole)
        _torch._functionalize_sync(whole)
        return args[0]

    def is_made(self, result: Any, target: Any, given: Any) -> bool:
        """Whether a result is that of an operator with these arguments."""
        known = isinstance(result, FunctionalTensor) and self._known(_inner(result))
        node = known.proxy.node if known else None
        return bool(node and node.target is target and (node.args, node.kwargs) == given)

    def traced(self, run: Callable[[], Any], func: Any, args: Any, kwargs: Any) -> Any:
        """A fake result of an operator, with a node for it."""
        calls = _mode(args).calls
        form = calls.result(func, args, kwargs)
        if form is not None:
            return self._node(func, args, kwargs, form)
        if func in _COUNTED:
            return self._counted(func, args, kwargs)
        result = run()
        with contextlib.suppress(Formless):  # of another mode, or of numbers that are known
            calls.learn(func, args, kwargs, result)
        return result

    def _counted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator gives whose result has, each time, a size that only data tell."""
        node = self._call(func, args, kwargs)
        result = func(*args, **kwargs)
        proxy_tensor._set_unbacked_bindings(result, fx.Proxy(node, self.tracer))
        return self._track(_mode(args), node, result)

    def _node(self, func: Any, args: Any, kwargs: Any, form: Any) -> Any:
        mode = _mode(args)
        new = mode.forms.new
        result = new(form) if isinstance(form, Form) else [new(part) for part in form]
        return self._track(mode, self._call(func, args, kwargs), result)

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        name = self.tracer.graph._target_to_str(func.overloadpacket.__name__)
        return self._create(func, *self.arguments(args, kwargs), name)

    def _create(self, target: Any, args: Any, kwargs: Any, name: str | None = None) -> fx.Node:
        return self.tracer.graph.create_node("call_function", target, args, kwargs, name)

    def _track(self, mode: RememberingMode, node: fx.Node, result: Any) -> Any:
        """A tensor, or several, as the value of a node."""
        node.meta["val"] = result
        if not isinstance(result, Tensor):
            for i, part in enumerate(result):
                self._track(mode, self._create(operator.getitem, (node, i), {}), part)
            return result
        form, proxy = mode.forms.of(result), fx.Proxy(node, self.tracer)
        if form in self.tracked:
            self.tracer.tensor_tracker[result] = proxy_tensor._ProxyTensor(proxy, None)
        else:
            proxy_tensor.track_tensor(result, proxy, constant=None, tracer=self.tracer)
            self.tracked.add(form)
        return result

    def arguments(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What stands for an operator's arguments in the graph."""
        return self._argument(tuple(args)), {n: self._argument(v) for n, v in kwargs.items()}

    def _known(self, tensor: Tensor) -> Any:
        return self.tracer.tensor_tracker.get(tensor)

    def _argument(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, Tensor):
            known = self._known(value)
            if known is None or known.constant is not None:
                raise _Unknown
            return known.proxy.node
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._argument, value))
        if isinstance(value, torch.SymInt):
            return proxy_tensor.get_proxy_slot(value, self.tracer).force().node
        if isinstance(value, (*PLAIN, *DESCRIBES)):
            return value
        raise _Unknown


def _unwrapped(arguments: Any) -> Any:
    """Arguments with what functionalization wraps in them."""
    if isinstance(arguments, Tensor):
        return _inner(arguments)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(map(_unwrapped, arguments))
    if isinstance(arguments, dict):
        return {name: _unwrapped(argument) for name, argument in arguments.items()}
    return arguments


def _inner(tensor: Tensor) -> Tensor:
    """What functionalization wraps, with all that was written to it."""
    if not isinstance(tensor, FunctionalTensor):
        raise _Unknown
    _torch._functionalize_sync(tensor.elem)
    return _torch._from_functional_tensor(tensor.elem)


def _viewed(mode: Any, func: Any, args: Any) -> Any:
    """What code gets of a view: functionalization keeps track of what is written to it."""
    if not isinstance(args[0], FunctionalTensor):
        raise _Unknown
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(_FUNCTIONALIZE)
    keys = torch._C.DispatchKeySet(_FUNCTIONALIZE), FunctionalTensor._extra_dispatch_keys
    with torch._C._ForceDispatchKeyGuard(included | keys[0], excluded - keys[1]):
        before = _torch._functionalize_enable_reapply_views(True)
        try:
            result = func._op_dk(_FUNCTIONALIZE, args[0].elem, *args[1:])
        finally:
            _torch._disable_functionalization()
            _torch._functionalize_enable_reapply_views(before)
    if isinstance(result, Tensor):
        wrapped: Any = FunctionalTensor(result, mode)
    else:
        wrapped = [FunctionalTensor(part, mode) for part in result]
    return return_and_correct_aliasing(func, args, {}, wrapped)


def _mode(args: Any) -> RememberingMode:
    """That of the first tensor."""
    for argument in args:
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        if isinstance(first, FakeTensor) and isinstance(first.fake_mode, RememberingMode):
            return first.fake_mode
    raise _Unknown


@functools.cache
def _is_plain(func: Any) -> bool:
    """Whether an operator gives tensors, the same ones each time, and changes nothing."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or func._schema.is_mutable:
        return False
    if not _ODD_TAGS.isdisjoint(func.tags) or func.overloadpacket.__name__ in _ODD:
        return False
    return all(str(result.type) in ("Tensor", "List[Tensor]") for result in func._schema.returns)


@functools.cache
def _functional(func: Any) -> Any:
    """What functionalization makes of an operator that it hands on; None for views and others."""
    if not isinstance(func, OpOverload):
        return None
    aliased = [a for a in func._schema.arguments if a.alias_info is not None]
    if not aliased:
        return func if _is_plain(func) else None
    name, overload = func.overloadpacket.__name__, func._overloadname
    if aliased != func._schema.arguments[:1] or not aliased[0].is_write or name[-1] != "_":
        return None
    target = getattr(getattr(torch.ops.aten, name[:-1], None), overload, None)
    return target if target is not None and _is_plain(target) else None

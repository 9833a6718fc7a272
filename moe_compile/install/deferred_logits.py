"""Logits that are not computed until somebody looks at them, and never where only their loss is.

In training the head of a language model returns `DeferredLogits`. The model's own code then does
with them what it always does: casts, scales, cuts off the last position, flattens, and calls
`cross_entropy`, which becomes `ops.linear_cross_entropy` of the hidden states. Anything else is
done to the logits themselves, which are then computed, once, and hold gradients as ever.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

Loss = Callable[..., Tensor]
Hook = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Transform:
    """A chain of functions of single elements, each with its other arguments; equal by value."""

    steps: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """Every step, in order."""
        for function, rest in self.steps:
            logits = function(logits, *rest)
        return logits

    def only_widens(self, dtype: torch.dtype) -> bool:
        """Whether it casts logits of `dtype` to float32, if anything, as the loss does itself."""
        casts = all(step == (Tensor.to, (torch.float32,)) for step in self.steps)
        return casts and (not self.steps or dtype != torch.float64)


@dataclass
class Backwards:
    """How many backwards a head has seen whose weight is sharded again after each."""

    count: int = 0

    def follow(self, result: Tensor) -> Tensor:
        """`result`, whose backward counts."""
        if result.requires_grad:
            result.register_hook(self._add)
        return result

    def _add(self, grad: Tensor) -> None:
        self.count += 1


@dataclass(frozen=True)
class Head:
    """What logits are computed from.

    Attributes:
        x: [..., H], hidden states.
        weight: [V, H].
        bias: [V], or None.
        loss: an implementation of `ops.linear_cross_entropy`.
        transform: from the head's output to the logits.
        version: the number of changes of the weight when the head was called.
        backwards: those of the head, where its weight is sharded; else None.
        seen: how many there had been when the head was called.
        aliases: deferred logits that would share memory, had they any.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    loss: Loss
    transform: Transform
    version: int
    backwards: Backwards | None = None
    seen: int = 0
    aliases: list[ref["DeferredLogits"]] = field(default_factory=list)

    def logits(self) -> Tensor:
        """All of them, with their gradients."""
        resharded = self.backwards is not None and (
            self.backwards.count != self.seen or not self.weight.untyped_storage().size()
        )
        if resharded or self.weight._version != self.version:
            raise RuntimeError(
                "the logits of a training step were read after the head's weight had "
                f"{'been sharded again' if resharded else 'changed'}; read them before backward, "
                "without reshard_after_forward, or pass OptimizeConfig(loss='model') to optimize"
            )
        with torch.enable_grad(), _without_autocast(self.x):
            logits = self.transform(F.linear(self.x, self.weight, self.bias))
        return self.followed(logits)

    def followed(self, result: Tensor) -> Tensor:
        """What was computed with the head's weight."""
        return result if self.backwards is None else self.backwards.follow(result)


def _without_autocast(x: Tensor) -> torch.autocast:
    """The head's own call has cast what autocast would cast."""
    return torch.autocast(x.device.type, enabled=False)


class _Identity(torch.autograd.Function):
    """Deferred logits as a part of the autograd graph, for code that torch functions do not see."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, head: Head
    ) -> "DeferredLogits":
        ctx.save_for_backward(x, weight, bias)
        ctx.head = head
        return DeferredLogits.of(head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors if t is not None]
        x, weight, *bias = leaves
        logits = replace(
            ctx.head,
            x=x,
            weight=weight,
            bias=bias[0] if bias else None,
            version=weight._version,
            backwards=None,
        ).logits()
        found = torch.autograd.grad(logits, leaves, grads[0])
        return *found, *(() if bias else (None,)), None


class DeferredLogits(Tensor):
    """The logits of a `Head`; a tensor to whoever looks."""

    head: Head
    computed: Tensor | None
    hooks: dict[int, Hook] | None

    @staticmethod
    def of(head: Head) -> "DeferredLogits":
        """Logits without a history."""
        shape = (*head.x.shape[:-1], head.weight.shape[0])
        with torch.no_grad():
            dtype = head.transform(head.x.new_empty(0, dtype=head.weight.dtype)).dtype
        logits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            DeferredLogits, shape, dtype=dtype, device=head.x.device
        )
        logits.head, logits.computed, logits.hooks = head, None, None
        head.aliases.append(ref(logits))
        return logits

    @staticmethod
    def defer(head: Head) -> Tensor:
        """Logits that are differentiable in the head's tensors."""
        logits: Tensor = _Identity.apply(head.x, head.weight, head.bias, head)
        return logits

    def compute(self) -> Tensor:
        """The logits themselves, the same ones each time."""
        if self.computed is None:
            self.computed = self.head.logits()
            if self.hooks:
                self.computed.register_hook(self._run_hooks)
        return self.computed

    def add_hook(self, hook: Hook) -> RemovableHandle:
        """Registers a hook on the logits, whether they are computed by then, later or never."""
        if self.computed is not None:
            return self.computed.register_hook(hook)
        if self.hooks is None:
            self.hooks = OrderedDict()
            with torch._C.DisableTorchFunctionSubclass():  # for what torch functions do not see
                self.register_hook(self._run_hooks)
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def _run_hooks(self, grad: Tensor) -> Tensor:
        for hook in list((self.hooks or {}).values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = args[0] if args else None
        if func is Tensor.register_hook and isinstance(logits, DeferredLogits):
            return logits.add_hook(*args[1:], **kwargs)
        # Only logits that are there have the gradient that a hook wants.
        if isinstance(logits, DeferredLogits) and logits.computed is None and not logits.hooks:
            found = _deferred(func, logits, args[1:], kwargs)
            if found is not None:
                return found
            _check_in_place(func, logits)
        return _call(func, DeferredLogits.compute, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Below autograd, which has seen the logits already: their values alone are wanted."""
        return _call(func, _values, args, kwargs or {})


def _call(
    func: Callable[..., Any],
    change: Callable[[DeferredLogits], Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`func` of arguments in which deferred logits are changed to others."""
    args = pytree.tree_map_only(DeferredLogits, change, args)
    named = pytree.tree_map_only(DeferredLogits, change, kwargs)
    return func(*args, **named)


def _values(logits: DeferredLogits) -> Tensor:
    # Not kept: what is computed below autograd has no history.
    return (logits.head.logits() if logits.computed is None else logits.computed).detach()


def _check_in_place(func: Callable[..., Any], logits: DeferredLogits) -> None:
    """Raises where a change would have to be seen in other deferred logits."""
    name = func.__name__
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if in_place and sum(alias() is not None for alias in logits.head.aliases) > 1:
        raise RuntimeError(
            f"the logits of a training step are changed by {name} while a view of them is kept; "
            "pass OptimizeConfig(loss='model') to optimize, or change them before taking the view"
        )


def _deferred(
    func: Callable[..., Any], logits: DeferredLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The result where it needs no logits yet, else None."""
    if func is F.cross_entropy:
        return _loss(logits, *rest, **kwargs)
    if func in _LEADING:
        x = None if kwargs else _leading(func, logits, rest)
        return None if x is None else DeferredLogits.defer(replace(logits.head, x=x))
    steps = _elementwise(func, rest, kwargs, logits.head.x.device)
    if steps is None:
        return None
    transform = Transform((*logits.head.transform.steps, *steps))
    aliases = logits.head.aliases if func not in _ELEMENTWISE else []
    return DeferredLogits.defer(replace(logits.head, transform=transform, aliases=aliases))


def _loss(
    logits: DeferredLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The cross-entropy of rows of logits; None for what the op does not say."""
    unusual = weight is not None or size_average is not None or reduce is not None
    if unusual or label_smoothing or reduction not in ("mean", "sum") or logits.dim() != 2:
        return None
    if type(target) is not Tensor or target.dtype != torch.int64 or target.dim() != 1:
        return None
    head = logits.head
    if target.shape[0] != logits.shape[0] or target.device != head.x.device:
        return None
    with _without_autocast(head.x):
        loss = head.loss(
            head.x,
            head.weight,
            target,
            head.bias,
            transform=None if head.transform.only_widens(head.x.dtype) else head.transform,
            ignore_index=ignore_index,
            mean=reduction == "mean",
        )
    loss = head.followed(loss)
    # As `cross_entropy` does: in float32 under autocast, else in the logits' dtype.
    return loss if torch.is_autocast_enabled(head.x.device.type) else loss.to(logits.dtype)


def _leading(
    func: Callable[..., Any], logits: DeferredLogits, rest: tuple[Any, ...]
) -> Tensor | None:
    """The hidden states of what `func` does to leading dimensions; None if the last one changes."""
    x, width = logits.head.x, logits.shape[-1]
    if func is Tensor.__getitem__:
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        return _indexed(x, index)
    if func is Tensor.contiguous:
        return None if rest else x
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if not shape or not all(isinstance(size, int) for size in shape) or shape[-1] != width:
        return None
    return x.reshape(*shape[:-1], x.shape[-1])


def _indexed(x: Tensor, index: tuple[Any, ...]) -> Tensor | None:
    """x at an index of slices and numbers that leaves the last dimension alone."""
    if not all(i is Ellipsis or isinstance(i, (slice, int)) for i in index):
        return None
    if index.count(Ellipsis) == 1:
        at = index.index(Ellipsis)
        whole = (slice(None),) * (x.dim() - len(index) + 1)
        index = (*index[:at], *whole, *index[at + 1 :])
    reaches_last = len(index) >= x.dim()
    return None if reaches_last and index[-1] != slice(None) else x[index]


def _elementwise(
    func: Callable[..., Any], rest: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...] | None:
    """The steps of a transform; None for anything but one of single elements and plain numbers."""
    if kwargs:
        return None
    if func is Tensor.float:
        return ((Tensor.to, (torch.float32,)),)
    if func is Tensor.to and len(rest) == 1 and isinstance(rest[0], torch.dtype):
        return ((Tensor.to, rest),)
    if func is Tensor.to and len(rest) == 1 and rest[0] == device:
        return ()
    if func in _ELEMENTWISE and all(isinstance(value, (int, float)) for value in rest):
        return ((_ELEMENTWISE[func], rest),)
    return None


_LEADING = {Tensor.__getitem__, Tensor.contiguous, Tensor.view, Tensor.reshape}

_ELEMENTWISE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    Tensor.tanh: torch.tanh,
    torch.tanh: torch.tanh,
    Tensor.mul: torch.mul,
    Tensor.__mul__: torch.mul,
    Tensor.__rmul__: torch.mul,
    torch.mul: torch.mul,
    Tensor.div: torch.div,
    Tensor.__truediv__: torch.div,
    torch.div: torch.div,
}

_PROPERTIES = (
    "_base _version device dtype grad_fn is_cpu is_cuda is_leaf is_meta is_nested is_quantized "
    "is_sparse layout ndim requires_grad shape"
)
_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.element_size,
    Tensor.__len__,
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
}
"""What asks of a tensor nothing that its values decide."""

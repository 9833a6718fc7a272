"""Results that a checkpointed call keeps for its recomputation, where it runs uncompiled.

Torch's own modes for this raise where a model changes a kept result in place, as routers do when
they normalise the weights of their picks: here such a result is copied before it changes. And they
keep a random result without the numbers that it drew, so that what draws after it would draw others
the second time: here what draws is computed again.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Keeps = Callable[[Any], bool]
"""Whether an operator's results are kept."""


def keeping(keeps: Keeps) -> tuple["_Keeping", "_Replaying"]:
    """The contexts of a forward and of its recomputation; a `context_fn` of `checkpoint`."""
    forward = _Keeping(keeps)
    return forward, _Replaying(keeps, forward.results)


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, keeps: Keeps) -> None:
        super().__init__()
        self.keeps = keeps

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets functions that are compiled by themselves run inside."""
        return True

    def is_kept(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self.keeps(op) and not _draws(op, args, kwargs)


class _Keeping(_Mode):
    """Runs everything, and keeps what is to be kept, each operator's results in order."""

    def __init__(self, keeps: Keeps) -> None:
        super().__init__(keeps)
        self.results: dict[Any, deque[Any]] = defaultdict(deque)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for changed in _changed(func, args, kwargs):
            self._spare(changed)
        result = func(*args, **kwargs)
        if self.is_kept(func, args, kwargs):
            # The tensors themselves are going to hold the graph that holds this.
            self.results[func].append(pytree.tree_map_only(Tensor, torch.detach, result))
        return result

    def _spare(self, changed: Tensor) -> None:
        """Copies what was kept of a tensor that is about to change."""

        def copied(kept: Tensor) -> Tensor:
            is_same = torch._C._is_alias_of(kept, changed)  # pyright: ignore[reportAttributeAccessIssue]
            return kept.clone() if is_same else kept

        for results in self.results.values():
            for i, result in enumerate(results):
                results[i] = pytree.tree_map_only(Tensor, copied, result)


class _Replaying(_Mode):
    """Gives what was kept, once; runs the rest."""

    def __init__(self, keeps: Keeps, results: dict[Any, deque[Any]]) -> None:
        super().__init__(keeps)
        self.results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.is_kept(func, args, kwargs):
            return func(*args, **kwargs)
        if not self.results[func]:
            raise RuntimeError(
                f"{func} got a second backward; with activation checkpointing a graph takes one: "
                "what the forward kept for it is gone; call the model again"
            )
        return self.results[func].popleft()


def _changed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes in place."""
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
        return []
    given = _named(op, args, kwargs)
    names = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [t for t in pytree.tree_leaves([given.get(n) for n in names]) if isinstance(t, Tensor)]


def _draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers; attention does for its dropout alone."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    return _named(op, args, kwargs).get("dropout_p", 1.0) != 0.0


def _named(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    declared = op._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    names = [a.name for a in declared]
    return defaults | dict(zip(names, args, strict=False)) | kwargs

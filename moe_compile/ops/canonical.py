"""The middle level of the rewriter: named operations whose meaning is a plain torch function.

Patterns raise subgraphs to canonical ops, providers lower canonical ops to kernels, and whatever no
provider takes is inlined from the reference. The target of a node in a graph is the op itself.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, fx

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False, repr=False)
class CanonicalOp(Generic[P, R]):
    """A named operation; its `reference` is differentiable and defines it."""

    name: str
    reference: Callable[P, R]

    def __post_init__(self) -> None:
        # FX prints, and imports, a node's target by its module and name.
        vars(self).update(
            __module__=self.reference.__module__,
            __doc__=self.reference.__doc__,
            __wrapped__=self.reference,
        )

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the reference; on FX proxies (a pattern's `after` being written), add a node."""
        proxies = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)]
        if proxies:
            node: Any = proxies[0].tracer.create_proxy("call_function", self, args, kwargs)
            return node
        return self.reference(*args, **kwargs)

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by name, defaults included."""
        bound = inspect.signature(self).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def __repr__(self) -> str:
        return f"<canonical op {self.name}>"

    def __reduce__(self) -> str:
        # A copied or unpickled graph must hold the very same op: ops are compared by identity.
        return self.name


OPS: dict[str, CanonicalOp[..., Any]] = {}
"""Every canonical op by name."""


def canonical(reference: Callable[P, R]) -> CanonicalOp[P, R]:
    """Make `reference` the meaning of a new op of the same name and list it in `OPS`."""
    op = CanonicalOp(reference.__name__, reference)
    assert op.name not in OPS, f"two canonical ops are called {op.name}"
    OPS[op.name] = op
    return op


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, but float64 as it is: a reference run in float64 must be so throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Arithmetic on symbolic sizes, done once.

For every tensor that has symbolic sizes torch computes its strides, its bytes and whether it is
contiguous anew: half of the time of a trace, for the same few products.
"""

import contextlib
from collections.abc import Callable, Generator, Hashable
from typing import Any
from unittest import mock

import sympy
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.capture.renaming import Renaming

_ARITHMETIC = ("add", "sub", "mul", "mod", "int_floordiv", "sym_max", "sym_min")
_COMPARISONS = ("eq", "ne", "gt", "ge", "lt", "le", "sym_and", "sym_or")
_OPERATIONS = [name for name in (*_ARITHMETIC, *_COMPARISONS) if hasattr(SymNode, name)]
"""Torch's own names, which another release may lack: there it only takes longer."""


class RememberingShapeEnv(ShapeEnv):
    """Symbolic sizes, with what was computed from them and asked of them."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[Hashable, SymNode] = {}
        self.answers: dict[Hashable, Any] = {}

    def evaluate_expr(
        self, orig_expr: Any, hint: Any = None, fx_node: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The answer to a question on sizes: the one that it had before."""
        if orig_expr in (sympy.true, sympy.false):
            return orig_expr
        key = (*self._known_as(orig_expr), args, *kwargs.items())
        if key not in self.answers:
            self.answers[key] = super().evaluate_expr(orig_expr, hint, fx_node, *args, **kwargs)
        return self.answers[key]

    def _known_as(self, expr: Any) -> tuple[Any, ...]:
        """What another expression must share to be answered alike.

        Data-dependent sizes are alike of which only the same range is known.
        """
        renaming = Renaming()
        renamed = renaming.key(expr)
        symbols = renaming.names
        if any(s in self.replacements or self.deferred_runtime_asserts.get(s) for s in symbols):
            return (expr,)
        return renamed, *((self.var_to_range.get(s), s in self.size_like) for s in symbols)


@contextlib.contextmanager
def remembered_arithmetic() -> Generator[None]:
    """In it, an operation on sizes whose result is known gives that, where nothing traces it."""
    with contextlib.ExitStack() as stack:
        for name in _OPERATIONS:
            remember = _remembering(name, getattr(SymNode, name))
            stack.enter_context(mock.patch.object(SymNode, name, remember))
        yield


def _remembering(name: str, operation: Callable[..., SymNode]) -> Callable[..., SymNode]:
    def remember(left: SymNode, right: Any) -> SymNode:
        env = left.shape_env
        if not isinstance(env, RememberingShapeEnv) or proxy_tensor.get_proxy_mode() is not None:
            return operation(left, right)
        key = (name, left._expr, left.pytype, right._expr, right.pytype)
        if key not in env.results:
            env.results[key] = operation(left, right)
        return env.results[key]

    return remember

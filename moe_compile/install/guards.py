"""Which guards a compiled layer needs: none on what `optimize` itself has put there.

Dynamo guards everything that it reads, in every call of every layer. Half of that are the call
forms in an installed forward's closure, the globals of emitted functions, and this library's own:
none of them ever changes.
"""

from collections.abc import Sequence
from typing import Any

EMITTED = "__moe_compile__"
"""Marks functions and globals as this library's own."""

_LIBRARY = "G['__import_moe_compile_dot_"


def foreign_guards(guards: Sequence[Any]) -> list[bool]:
    """Whether to keep each guard of a compilation; a `guard_filter_fn` of `torch.compile`."""
    own = (_LIBRARY, *(prefix for guard in guards if (prefix := _own_prefix(guard))))
    return [not guard.name.startswith(own) for guard in guards]


def _own_prefix(guard: Any) -> str | None:
    """What the names of guards on the inside of something of ours begin with."""
    if isinstance(guard.value, dict) and EMITTED in guard.value:
        return guard.name
    # The function's code, which is its alone, stays guarded: another may be put in its place.
    return f"{guard.name}.__closure__" if EMITTED in getattr(guard.value, "__dict__", ()) else None

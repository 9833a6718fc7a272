"""Numbers for symbolic sizes, so that small real tensors of a captured form can be made."""

from typing import Any

import sympy
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.rewrite.refuse import Refuse

_FEW, _DOUBLINGS = 5, 20


def example_sizes(fakes: list[Tensor]) -> list[list[int]]:
    """The sizes of each tensor: what they were traced with, or a few rows where data decides.

    A size may be a fraction of a number that depends on data, such as rows of a flat tensor: then
    there are as many as make every size two or more.

    Raises:
        Refuse: data and other sizes decide on a size together.
    """
    shapes: list[list[Any]] = [list(fake.shape) for fake in fakes]
    for doublings in range(_DOUBLINGS):
        rows = _FEW << doublings
        found = [[_number(size, rows) for size in shape] for shape in shapes]
        routed = [
            number
            for shape, numbers in zip(shapes, found, strict=True)
            for size, number in zip(shape, numbers, strict=True)
            if free_unbacked_symbols(size)
        ]
        if all(number > 1 for number in routed):
            return found
    raise Refuse("it is called with no rows that small random inputs could have")


def _number(size: Any, rows: int) -> int:
    if isinstance(size, int):
        return size
    counts = free_unbacked_symbols(size)
    if not counts:
        return size.node.hint
    number = size.node.expr.xreplace(dict.fromkeys(counts, sympy.Integer(rows)))
    if not number.is_Integer:
        raise Refuse(f"the size {size} of its argument depends on data")
    return int(number)

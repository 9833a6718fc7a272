"""Lets code whose control flow depends on the routing be traced: as if every expert were hit.

A loop over the experts that some token picked unrolls to all of them; a count of tokens is a
symbolic size that is not zero. What comes out is a graph for every routing, since a selection of
no rows is a selection too; that it computes what the code does is proven and verified afterwards.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    free_unbacked_symbols,
)
from torch.overrides import TorchFunctionMode

from moe_compile.capture.any_dtype import AnyDtypeGroupedMM
from moe_compile.capture.conversions import free_conversions
from moe_compile.capture.size_arithmetic import remembered_arithmetic
from moe_compile.capture.symbolic_ints import symbolic_ints

_SEVERAL = (3, 1 << 40)
"""How many rows an expert gets, where the code asks: what it does must be the same for both."""

_SAMPLE = 2
"""How many experts stand for all that are hit."""

_NONZERO = {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere}
_COUNTS = {torch.bincount, Tensor.bincount}
_ASKS = {Tensor.__bool__, Tensor.item}
"""What an `if` calls: the second, where tensors are being made functional."""

_ASSERTS = {torch.ops.aten._assert_tensor_metadata}
"""What casts are preceded by: the trace would keep none."""

_TRUE_IF_HIT = {"any", "gt", "__gt__", "greater", "ne", "__ne__", "not_equal", "ge", "__ge__"}
_FALSE_IF_HIT = {"eq", "__eq__", "equal", "lt", "__lt__", "less", "le", "__le__", "logical_not"}


class RandomExperts(Exception):
    """Dropout of an expert's rows: no rewrite draws the same random numbers."""


class Hit(int):
    """The number of an expert that is hit; answers to what loops do to an element of a tensor."""

    def __getitem__(self, _: Any) -> "Hit":
        return Hit(self)

    def _itself(self, *_: Any, **__: Any) -> "Hit":
        return self

    def _number(self, *_: Any, **__: Any) -> "Hit":
        return Hit(self)

    flatten = view = reshape = long = int = cpu = to = detach = _itself
    item = squeeze = _number


class HitRow(Hit):
    """A row of `nonzero`: a vector with one number, which as an index keeps the dimension."""


class Hits:
    """What `nonzero` of a vector over experts gives where every expert is hit."""

    def __init__(self, count: int, kind: type[Hit]) -> None:
        self.numbers = [kind(i) for i in range(count)]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        """One of them, or a column: all."""
        return self.numbers[index] if isinstance(index, int) else self._numbers()

    @property
    def shape(self) -> torch.Size:
        """As of the tensor that it stands for."""
        return torch.Size((len(self.numbers), 1))

    def size(self, dim: int = 0) -> int:
        """As of the tensor that it stands for."""
        return self.shape[dim]

    def numel(self) -> int:
        """As of the tensor that it stands for."""
        return len(self.numbers)

    def tolist(self) -> list[Hit]:
        """The numbers."""
        return self.numbers

    def _itself(self, *_: Any, **__: Any) -> "Hits":
        return self

    def _numbers(self, *_: Any, **__: Any) -> "Hits":
        return Hits(len(self.numbers), Hit)

    cpu = to = long = detach = unbind = numpy = _itself
    squeeze = flatten = view = reshape = _numbers


@contextlib.contextmanager
def traceable(
    *modules: nn.Module,
    assumed: Callable[[], None] = lambda: None,
    left_out: Callable[[], None] = lambda: None,
    sampled: bool = False,
    drops: bool = True,
) -> Generator["EveryExpertHit"]:
    """In it, expert blocks of every kind, of these modules, run on fake tensors.

    Args:
        assumed: is called whenever their code got an answer that another routing may not give.
        left_out: is called whenever their code was told of few of its experts.
        sampled: whether a few experts will do for all that are hit: where no graph is kept, or none
            of them will be rewritten.
        drops: whether experts may have dropout; where not, it ends in `RandomExperts`.
    """
    answers = EveryExpertHit(assumed, left_out, sampled, drops)
    with (
        free_conversions(),
        symbolic_ints(modules),
        remembered_arithmetic(),
        AnyDtypeGroupedMM(),
        answers,
    ):
        yield answers


class EveryExpertHit(TorchFunctionMode):
    """Answers what code asks of a routing as if every expert had got some rows.

    Attributes:
        left_out: whether code was told of a few experts where every one is hit.
    """

    def __init__(
        self,
        assumed: Callable[[], None],
        leave_out: Callable[[], None],
        sampled: bool,
        drops: bool,
    ) -> None:
        super().__init__()
        self.assumed, self.leave_out = assumed, leave_out
        self.sampled, self.drops = sampled, drops
        self.left_out = False
        self.answers: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ASSERTS:
            return None
        if func in _NONZERO and _is_over_experts(args[0]):
            return self._hits(args[0], kwargs.get("as_tuple", False))
        if func is torch.where and len(args) == 1 and _is_over_experts(args[0]):
            return self._hits(args[0], as_tuple=True)
        if func in _ASKS and id(args[0]) in self.answers:
            self.assumed()
            return self.answers[id(args[0])][1]
        if func in _COUNTS:
            return _counts(*args, **kwargs)
        if func is F.dropout and not self.drops and _draws_for_expert(*args, **kwargs):
            raise RandomExperts
        if func is Tensor.numpy:
            return _as_numbers(args[0])
        if func is Tensor.__getitem__:
            return _item(func, *args)
        if func is Tensor.__setitem__:
            args = tuple(map(_with_sizes, args))
        result = func(*args, **kwargs)
        self._remember(getattr(func, "__name__", ""), args, result)
        return result

    def _hits(self, vector: Tensor, as_tuple: bool) -> Any:
        if self.sampled:
            self.left_out = True
            self.leave_out()
        count = min(vector.shape[0], _SAMPLE) if self.sampled else vector.shape[0]
        hits = Hits(count, Hit if as_tuple else HitRow)
        return (hits,) if as_tuple else hits

    def _remember(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """The answer to a question that was asked with a tensor of one element.

        Whether an expert got more than some number of rows differs from call to call.
        """
        beyond_one = any(isinstance(a, (int, float)) and abs(a) > 1 for a in args[1:])
        if name not in _TRUE_IF_HIT | _FALSE_IF_HIT or beyond_one:
            return
        if isinstance(result, Tensor) and result.dim() == 0:
            self.answers[id(result)] = (result, name in _TRUE_IF_HIT)


def _draws_for_expert(input: Tensor, p: float = 0.5, training: bool = True, **_: Any) -> bool:
    """Whether dropout is on, over as many rows as some expert got."""
    return training and p > 0 and any(free_unbacked_symbols(size) for size in input.shape)


def _item(getitem: Any, tensor: Tensor, index: Any) -> Any:
    if isinstance(index, Hit) and _is_beyond(index, tensor):
        # The number of picks that live on other ranks, which on one device are none: without
        # tokens, any weights do.
        item = tensor.new_zeros(tensor.shape[1:])
    elif isinstance(index, Hit):
        item = getitem(tensor, int(index))
    else:
        return getitem(tensor, _with_sizes(index))
    return item.unsqueeze(0) if isinstance(index, HitRow) else item


def _is_beyond(index: Hit, tensor: Tensor) -> bool:
    """Whether it is the number after that of the last expert."""
    count: Any = tensor.shape[0]
    return isinstance(count, int) and index == count


def _with_sizes(index: Any) -> Any:
    """An index whose slices begin and end at symbolic sizes, where they do at tensors."""
    if isinstance(index, tuple):
        return tuple(map(_with_sizes, index))
    if not isinstance(index, slice):
        return index
    ends = (index.start, index.stop, index.step)
    return slice(*(end.item() if isinstance(end, Tensor) else end for end in ends))


def _is_over_experts(tensor: Any) -> bool:
    """Whether it is a vector of fixed length: tokens are never that."""
    sizes: list[Any] = list(tensor.shape) if isinstance(tensor, Tensor) else []
    return len(sizes) == 1 and isinstance(sizes[0], int)


def _counts(numbers: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """`bincount` of the numbers of experts: as many counts as the code expects at least."""
    if minlength == 0:
        return torch.bincount(numbers, weights, minlength)
    ones = torch.ones_like(numbers) if weights is None else weights
    return ones.new_zeros(minlength).scatter_add(0, numbers.long(), ones)


def _as_numbers(tensor: Tensor) -> Any:
    """Counts on the host, as numpy has them, with symbolic sizes in the place of numbers."""
    import numpy

    numbers = numpy.empty(tensor.numel(), dtype=object)
    numbers[:] = tensor.flatten().tolist()
    return numbers.reshape(tuple(tensor.shape))


class HitShapeEnv(ShapeEnv):
    """Symbolic sizes, of which those that depend on the routing are taken to be several rows.

    Where the experts' rows meet something as long as all picks, they are all rows: else the code
    would fail.
    """

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        """The answer to a question on sizes."""
        try:
            return super().evaluate_expr(orig_expr, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if _may_be_all_rows(orig_expr):
                return sympy.true
            counts = free_unbacked_symbols(orig_expr)
            few, many = (
                super(HitShapeEnv, self).evaluate_expr(
                    orig_expr.xreplace(dict.fromkeys(counts, sympy.Integer(several))),
                    *args,
                    **kwargs,
                )
                for several in _SEVERAL
            )
            if few != many:
                raise
            return few


def _may_be_all_rows(expr: Any) -> bool:
    """Whether it says that rows which depend on the routing are as many as tokens or picks."""
    if not isinstance(expr, sympy.Eq):
        return False
    sides = [side.free_symbols for side in expr.args]
    routed = free_unbacked_symbols(expr)
    return any(side & routed for side in sides) and any(side - routed for side in sides)

"""Masks that say which expert takes which token, such as one-hot rows but for those dropped.

What an expert's capacity leaves over depends on all tokens at once. Where a model writes it into a
mask, what is below the mask is a weighted sum again: over the picks that are left.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.rewrite.normal_form import aten, schema_arguments, value

_VIEWS = {aten.reshape.default, aten.unsqueeze.default, aten.clone.default, aten.to.dtype}
_ANDS = {aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor}
_PRODUCTS = {aten.mul.Tensor, *_ANDS}
_SUMS = {aten.add.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor}
_OVER_PICKS = {aten.sum.dim_IntList, aten.amax.default, aten.any.dim}
_NOT_ZERO = {aten.ne.Scalar, aten.gt.Scalar}


@dataclass(frozen=True)
class Mask:
    """Zeros and ones.

    Attributes:
        node: [T, E]; or [T, K, E], a row for each pick.
        ones: the most that a row of E has.
    """

    node: fx.Node
    ones: int

    @classmethod
    def of(cls, node: fx.Node, experts: int) -> "Mask | None":
        """The node as a mask; None where it is none, or only spells ids."""
        shape: list[Any] = list(value(node).shape)
        if len(shape) not in (2, 3) or shape[-1] != experts or not _is_binary(node):
            return None
        if _is_one_hot(node):
            return None
        mask = cls(node, _most_in_row(node))
        return mask if len(shape) == 2 or mask.ones == 1 else None

    @property
    def picks(self) -> int:
        """How many picks a token has."""
        shape: list[int] = list(value(self.node).shape)
        return self.ones if len(shape) == 2 else shape[1]

    def ids(self, mask: Any) -> Any:
        """The experts of each token as [T, K], -1 for a pick that is dropped; also of a proxy."""
        top: Any = aten.topk.default(aten.to.dtype(mask, torch.int64), self.ones)
        ids = aten.masked_fill.Scalar(top[1], aten.eq.Scalar(top[0], 0), -1)
        return ids if value(self.node).dim() == 2 else aten.squeeze.dim(ids, 2)

    def draw(self, tokens: int, generator: torch.Generator) -> Tensor:
        """A random mask, some picks of which are dropped; the first token's picks are all alike."""
        chance = torch.rand(tokens, *value(self.node).shape[1:], generator=generator)
        chosen = chance.topk(self.ones).indices
        if chosen.dim() == 3:
            chosen[0] = chosen[0, 0].clone()
        kept = torch.rand(chosen.shape, generator=generator) > 0.3
        return torch.zeros_like(chance).scatter(-1, chosen, kept.float()).to(value(self.node).dtype)


def ones_of(arguments: list[fx.Node]) -> tuple[int | None, ...]:
    """Of each argument of a call, the most ones in a row where it is a mask."""
    return tuple(_most_in_row(n) if _may_be_mask(n) and _is_binary(n) else None for n in arguments)


def note_ones(arguments: list[fx.Node], ones: tuple[int | None, ...]) -> None:
    """Notes it on the arguments in the module's own graph, which does not show who calls it.

    Of another form of the call, with more tensors or fewer, nothing is known.
    """
    known = ones if len(ones) == len(arguments) else [None] * len(arguments)
    for argument, most in zip(arguments, known, strict=True):
        if most is not None and _may_be_mask(argument):
            argument.meta["ones"] = most


def _may_be_mask(node: fx.Node) -> bool:
    """Whether it has rows of integers or booleans, all as wide."""
    result = value(node)
    is_kind = result.dim() in (2, 3) and not result.is_floating_point()
    return is_kind and isinstance(result.shape[-1], int)


def example_mask(sizes: list[int], ones: int) -> Tensor:
    """A mask with at most so many ones in a row, and none in the first one."""
    rows = torch.Size(sizes[:-1]).numel()
    numbers = (torch.arange(rows)[:, None] + torch.arange(ones)) % sizes[-1]
    mask = torch.zeros(rows, sizes[-1], dtype=torch.int64).scatter(1, numbers, 1)
    mask[0] = 0
    return mask.view(sizes)


def _is_binary(node: fx.Node) -> bool:
    """Whether the graph shows that it is zeros and ones."""
    if "ones" in node.meta:
        return True
    if value(node).dtype == torch.bool or node.target is aten.one_hot.default:
        return True
    if node.target is aten.scatter.value:
        return bool(node.args[3] == 1) and _is_zeros(node.args[0])
    if node.target in _VIEWS or _masks_with_zero(node):
        return _is_binary(node.args[0])  # type: ignore[arg-type]
    is_product = node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2
    return is_product and all(map(_is_binary, node.all_input_nodes))


def _most_in_row(node: fx.Node) -> int:
    """The most numbers of a row that are not zero, as far as the graph shows."""
    width: int = value(node).shape[-1]
    if "ones" in node.meta:
        return node.meta["ones"]
    if _is_one_hot(node):
        return 1
    if node.target in (aten.scatter.value, aten.scatter.src) and _is_zeros(node.args[0]):
        return min(width, value(node.args[2]).shape[-1])  # type: ignore[arg-type]
    operands = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
    most = [_most_in_row(n) for n in operands if value(n).shape[-1:] == (width,)]
    if not most:
        return width
    if node.target in _PRODUCTS or node.target in _VIEWS or _masks_with_zero(node):
        return min(most)
    if node.target in _SUMS and len(most) == len(node.args) == 2:
        return min(width, sum(most))
    if node.target in _NOT_ZERO and node.args[1] == 0:
        return most[0]
    return min(width, most[0] * _summed(node)) if node.target in _OVER_PICKS else width


def _summed(node: fx.Node) -> int:
    """How many rows are added up; as many as a row is wide where there may be any number."""
    source, dims = value(node.all_input_nodes[0]), schema_arguments(node)["dim"]
    sizes = [source.shape[dim] for dim in ([dims] if isinstance(dims, int) else dims)]
    static = all(isinstance(size, int) for size in sizes) and value(node).dim() < source.dim()
    return torch.Size(sizes).numel() if static else value(node).shape[-1]


def _is_one_hot(node: fx.Node) -> bool:
    """Whether it has a one for each id, in this or another spelling."""
    if node.target in _VIEWS:
        return _is_one_hot(node.args[0])  # type: ignore[arg-type]
    return node.target is aten.one_hot.default or _compares_with_range(node)


def _compares_with_range(node: fx.Node) -> bool:
    """Whether it is `ids[..., None] == arange(experts)`."""
    if node.target is not aten.eq.Tensor or len(node.all_input_nodes) < 2:
        return False
    ids, numbers = sorted(node.all_input_nodes, key=lambda n: value(n).dim(), reverse=True)
    return numbers.target is aten.arange.default and value(ids).shape[-1] == 1


def _masks_with_zero(node: fx.Node) -> bool:
    return node.target is aten.masked_fill.Scalar and bool(node.args[2] == 0)


def _is_zeros(node: Any) -> bool:
    return isinstance(node, fx.Node) and "zeros" in str(node.target)

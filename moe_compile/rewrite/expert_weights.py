"""Which operands are the weights of experts: parts of a stack, slices, or parameters in a row."""

import operator
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.rewrite.expert_bodies import TRANSPARENT, Stack, signature_of, strip
from moe_compile.rewrite.normal_form import aten, value

PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
"""Products of rows with one matrix."""


@dataclass(frozen=True)
class Weight:
    """A weight as one expert uses it: of which family, whose, how it lies, and from where."""

    family: str
    expert: int
    transposed: bool
    node: fx.Node
    whole: fx.Node | None


@dataclass(frozen=True)
class Product:
    """Rows times a weight of one expert, with its bias or None."""

    node: fx.Node
    rows: fx.Node
    weight: Weight
    bias: Any


def products(graph: fx.Graph) -> list[Product]:
    """Every product with one expert's weight."""
    numbered = _numbered_parameters(graph)
    found: list[Product] = []
    for node in graph.nodes:
        if node.target not in PRODUCTS or not isinstance(node.args[1], fx.Node):
            continue
        weight = _weight(node.args[1], numbered, node.target is not aten.linear.default)
        if weight is not None:
            bias = node.args[2] if len(node.args) > 2 else None
            found.append(Product(node, strip(node.args[0]), weight, bias))
    return found


def _numbered_parameters(graph: fx.Graph) -> dict[str, tuple[str, int]]:
    """Parameters that are one of a row, such as `experts.3.up.weight`: their family and number."""
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    shapes = {str(n.target): tuple(value(n).shape) for n in graph.nodes if n.op == "get_attr"}
    families: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        for digits in re.finditer(r"\d+", name):
            family = f"{name[: digits.start()]}#{name[digits.end() :]}"
            families[family][int(digits.group())] = name
    found: dict[str, tuple[str, int]] = {}
    for family, members in sorted(families.items(), key=lambda item: len(item[1])):
        alike = len({shapes[name] for name in members.values()}) == 1
        if alike and len(members) > 1 and set(members) == set(range(len(members))):
            found |= {name: (family, number) for number, name in members.items()}
    return found


def _weight(node: fx.Node, numbered: dict[str, tuple[str, int]], transposed: bool) -> Weight | None:
    """Whose weight the operand of a product is; None for that of no expert."""
    node = strip(node)
    if node.target is aten.transpose.int:
        return _weight(node.args[0], numbered, not transposed)  # type: ignore[arg-type]
    if node.op == "get_attr":
        family, expert = numbered.get(str(node.target), ("", -1))
        return Weight(family, expert, transposed, node, None) if family else None
    part = _part_of_stack(node)
    if part is None:
        return None
    whole, expert = part
    return Weight(signature_of(whole, {}, {}), expert, transposed, node, whole)


def _part_of_stack(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The stack and the number, where the node is one expert's part of a whole parameter."""
    if node.target is aten.select.int and node.args[1] == 0:
        whole, index = node.args[0], node.args[2]
    elif node.target is operator.getitem and _is_unbound(node.args[0]):
        whole, index = node.args[0].args[0], node.args[1]  # type: ignore[union-attr]
    elif node.target in (aten.squeeze.dim, aten.reshape.default):
        whole, index = _single_slice(node.args[0])
    else:
        return None
    if not isinstance(whole, fx.Node) or not isinstance(index, int) or not is_stored(whole):
        return None
    return whole, index


def _is_unbound(node: Any) -> bool:
    """Whether it is the list of the parts of a stack."""
    return node.target is aten.unbind.int and node.args[1:] in ((), (0,))


def _single_slice(node: Any) -> tuple[Any, Any]:
    """What `x[i : i + 1]` is taken from, and i."""
    if isinstance(node, fx.Node) and node.target is aten.slice.Tensor and node.args[1] == 0:
        start, end = node.args[2:4]
        if isinstance(start, int) and end == start + 1:  # type: ignore[operator]
            return node.args[0], start
    return None, None


def is_stored(node: fx.Node) -> bool:
    """Whether the node is a parameter with an expert dimension, or a view of one."""
    while node.target in (aten.reshape.default, *TRANSPARENT):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr"


def stack_of(weights: list[Weight]) -> Stack:
    """One weight of all experts, whole where the model stores it so."""
    whole, transposed = weights[0].whole, weights[0].transposed
    if whole is not None and value(whole).shape[0] == len(weights):
        return Stack((whole,), transposed)
    return Stack(tuple(weight.node for weight in weights), transposed)


def bias_stack_of(biases: list[fx.Node]) -> Stack:
    """The same for biases."""
    parts = [_part_of_stack(strip(bias)) for bias in biases]
    if parts[0] is not None:
        return Stack((parts[0][0],))
    return Stack(tuple(strip(bias) for bias in biases))

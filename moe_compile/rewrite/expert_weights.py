"""Which operands are the weights of experts: parts of a stack, slices, or parameters in a row."""

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.rewrite.expert_bodies import TRANSPARENT, Stack, signature_of, strip
from moe_compile.rewrite.expert_norm import Norm, norm_after
from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse

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
    """Rows times a weight of one expert.

    Attributes:
        node: the result, with its bias.
        operand: the rows as they are multiplied; `rows` without casts and copies.
        bias: or None.
        nodes: the product, and the addition of the bias where it is apart.
        norm: what follows it, if it is the last of an expert.
    """

    node: fx.Node
    operand: fx.Node
    rows: fx.Node
    weight: Weight
    bias: Any
    nodes: frozenset[fx.Node]
    norm: Norm | None

    @property
    def end(self) -> fx.Node:
        """What an expert gives that ends in this product."""
        return self.node if self.norm is None else self.norm.result

    @property
    def last_nodes(self) -> frozenset[fx.Node]:
        """Everything from the product to that."""
        return self.nodes if self.norm is None else self.nodes | self.norm.nodes

    @property
    def norm_signature(self) -> str:
        """A spelling of the norm that is equal for equal ones."""
        if self.norm is None:
            return ""
        # The weight of all is named in it; of their own ones, each has another.
        own = {self.norm.weight: 1} if self.norm.weight is not None and self.norm.is_own else {}
        return signature_of(self.norm.result, {self.node: 0} | own, {})

    @property
    def is_normed(self) -> bool:
        """Whether each expert has a norm of its own."""
        return self.norm is not None and self.norm.is_own


def products(graph: fx.Graph) -> list[Product]:
    """Every product with one expert's weight."""
    numbered = numbered_parameters(graph)
    found: list[Product] = []
    for node in graph.nodes:
        if node.target not in PRODUCTS or not isinstance(node.args[1], fx.Node):
            continue
        weight = _weight(node.args[1], numbered, node.target is not aten.linear.default)
        if weight is not None:
            found.append(_product(node, weight, numbered))
    return found


def _product(node: fx.Node, weight: Weight, numbered: dict[str, tuple[str, int]]) -> Product:
    operand: Any = node.args[0]
    bias = node.args[2] if len(node.args) > 2 else None
    result = node

    def is_own(vector: fx.Node) -> bool:
        return _expert_of_vector(vector, numbered) == weight.expert

    if bias is None:
        result, bias = with_bias(node, is_own)
    nodes, norm = frozenset({node, result}), norm_after(result, is_own)
    return Product(result, operand, strip(operand), weight, bias, nodes, norm)


def with_bias(node: fx.Node, is_bias: Callable[[fx.Node], bool]) -> tuple[fx.Node, fx.Node | None]:
    """A product after its bias was added, and the bias; the product alone where there is none."""
    user = next(iter(node.users), None)
    if len(node.users) == 1 and user is not None and user.target is aten.add.Tensor:
        others = [a for a in user.args if a is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node) and is_bias(others[0]):
            return user, others[0]
    return node, None


def _expert_of_vector(node: fx.Node, numbered: dict[str, tuple[str, int]]) -> int | None:
    """Whose bias, or weight of a norm, it is; None if nobody's."""
    node = strip(node)
    if value(node).dim() != 1:
        return None
    if node.op == "get_attr":
        return numbered[str(node.target)][1] if str(node.target) in numbered else None
    part = _part_of_stack(node)
    return None if part is None else part[1]


def numbered_parameters(graph: fx.Graph) -> dict[str, tuple[str, int]]:
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


def vector_stack_of(vectors: list[fx.Node | None]) -> Stack | None:
    """The same for biases and weights of norms; None where there are none."""
    if vectors[0] is None:
        return None
    parts = [_part_of_stack(strip(vector)) for vector in vectors]
    wholes = {signature_of(part[0], {}, {}): part[0] for part in parts if part is not None}
    whole = next(iter(wholes.values()), None)
    # Of one stack alone, and of all of it: another model may take vectors from here and there.
    if whole is None or len(wholes) > 1 or value(whole).shape[0] != len(vectors) or None in parts:
        return Stack(tuple(strip(vector) for vector in vectors))
    return Stack((whole,))


def norm_weight_of(norms: Sequence[Norm | None]) -> Stack | fx.Node | None:
    """Of the same norm after every expert: each one's weight, or that of all."""
    first = norms[0]
    if first is None or not first.is_own:
        return first and first.weight
    return vector_stack_of([norm.weight for norm in norms if norm is not None])


def bias_stacks(stacks: Sequence[Stack | None], node: fx.Node) -> tuple[Stack, ...]:
    """The biases of the first products: of all of them or of none."""
    found = tuple(stack for stack in stacks if stack is not None)
    if len(found) not in (0, len(stacks)):
        raise Refuse("only some of an expert's first products have a bias", node)
    return found

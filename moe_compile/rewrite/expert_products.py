"""Finds products with experts' weights, however rows get to them: the report leaves none out.

A weight is an expert's where parameters hold several of a kind, and tokens choose between them.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_compile.kernels.grouped_mm import grouped_mm
from moe_compile.rewrite.chosen_experts import PRODUCTS, are_chosen
from moe_compile.rewrite.expert_weights import numbered_parameters
from moe_compile.rewrite.normal_form import aten, value

_Kinds = frozenset[tuple[str, int]]
"""Stacks, and rows of modules such as `experts.#`, with how many each holds."""


def expert_products(graph: fx.Graph) -> dict[str, fx.Node]:
    """The first product with weights that each module holds, by its name, "" for the unit itself.

    The module has a stack of weights, or is a list of modules with one each. What was rewritten to
    experts does not count; single experts may have been rewritten to MLPs.
    """
    kinds = _kinds(graph)
    products = [(n, weight) for n in graph.nodes for weight in _weights(n, kinds)]
    stacks: dict[tuple[str, int], list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for node, weight in products:
        for kind in sorted(kinds[weight]):
            stacks[kind].append((node, weight))
    nodes, computed = [n for n, _ in products], [n for n in graph.nodes if n not in kinds]
    found: dict[str, fx.Node] = {}
    for (name, count), uses in stacks.items():
        members, holder = [node for node, _ in uses], name.rpartition(".")[0]
        if holder not in found and (
            any(_is_routed(node, weight) for node, weight in uses)
            or are_chosen(members, count, nodes, computed)
        ):
            found[holder] = members[0]
    return found


def _kinds(graph: fx.Graph) -> dict[fx.Node, _Kinds]:
    """What is made of parameters alone, with the kinds that it is taken from."""
    numbered = numbered_parameters(graph)
    families = [family for family, _ in numbered.values()]
    found: dict[fx.Node, _Kinds] = {}
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if _is_floating(source)]
        if str(node.target) in numbered and node.op == "get_attr":
            family = numbered[node.target][0]
            found[node] = frozenset({(family.partition("#")[0] + "#", families.count(family))})
        elif node.op == "get_attr" or (sources and all(source in found for source in sources)):
            found[node] = _several(node).union(*(found[source] for source in sources))
    return found


def _several(node: fx.Node) -> _Kinds:
    """How many a stack has, or a matrix with several in its rows, where it is one or a part."""
    source: Any = node if node.op == "get_attr" else node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr" or not _is_floating(node):
        return frozenset()
    whole, part, count = value(source), value(node), None
    if isinstance(part, Tensor) and part.dim() > 2:
        count = part.shape[0]
    elif node.target is aten.slice.Tensor and whole.dim() == part.dim() == 2:
        count = whole.shape[0] // max(part.shape[0], 1)
    if not isinstance(count, int) or count < 2:
        return frozenset()
    return frozenset({(str(source.target), count)})


def _weights(node: fx.Node, kinds: dict[fx.Node, _Kinds]) -> Iterator[fx.Node]:
    """The operands of a product that are made of parameters, where the others are not."""
    multiplies = node.target in PRODUCTS and "made_by" not in node.meta
    if node not in kinds and (multiplies or node.meta.get("kind") == "mlp"):
        yield from (operand for operand in node.all_input_nodes if operand in kinds)


def _is_routed(node: fx.Node, weight: fx.Node) -> bool:
    """Whether data picks the rows, or each row's weights."""
    if node.target is grouped_mm._opoverload or not all(
        isinstance(size, int) for size in value(weight).shape
    ):
        return True
    return any(free_unbacked_symbols(size) for size in value(node).shape)


def _is_floating(node: fx.Node) -> bool:
    """Whether it is a tensor of floats, or several."""
    result = node.meta.get("val")
    first = result[0] if isinstance(result, (list, tuple)) and result else result
    return isinstance(first, Tensor) and first.is_floating_point()

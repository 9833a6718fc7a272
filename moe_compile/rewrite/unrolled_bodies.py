"""Finds the bodies of experts that stand one after the other: loops that the trace unrolled."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from moe_compile.rewrite.expert_bodies import (
    Bodies,
    Step,
    attempt,
    between,
    reaches,
    side_by_side,
    signature_of,
)
from moe_compile.rewrite.expert_weights import (
    Product,
    bias_stacks,
    norm_weight_of,
    products,
    stack_of,
    vector_stack_of,
)
from moe_compile.rewrite.joined_bodies import around_one_activation
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import Region


def unrolled_bodies(graph: fx.Graph) -> Iterator[Bodies | Refuse]:
    """The bodies of every block whose experts stand one after the other in the graph.

    What looks like one and is none comes as a refusal.
    """
    found, singles = products(graph), list[dict[int, list[Product]]]()
    while found:
        block = _take_block(found)
        if len({p.weight.family for p in block[min(block)]}) > 1:
            yield attempt(_assemble, block)
        else:
            singles.append(block)
    yield from around_one_activation(singles)


def _take_block(products: list[Product]) -> dict[int, list[Product]]:
    """Takes out the products of one block: of the first one's experts, as far as they reach."""
    families = {p.weight.family for p in _of_first_body(products)}
    block = [p for p in products if p.weight.family in families]
    products[:] = [p for p in products if p.weight.family not in families]
    by_expert: dict[int, list[Product]] = defaultdict(list)
    for product in block:
        by_expert[product.weight.expert].append(product)
    return by_expert


def _of_first_body(products: list[Product]) -> list[Product]:
    """The first product, those of its expert that share its rows, and the next one after them."""
    first = products[0]
    own = {p.node: p for p in products if p.weight.expert == first.weight.expert}
    found = {node: p for node, p in own.items() if p.rows is first.rows}
    todo, seen = [user for node in found for user in node.users], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in own:
            found[node] = own[node]
        elif node not in seen and _leading(node) == _leading(first.node):
            seen.add(node)
            todo += node.users
    return list(found.values())


def _leading(node: fx.Node) -> list[str]:
    """The sizes of a value but for its last."""
    result = node.meta.get("val")
    return [str(size) for size in result.shape[:-1]] if isinstance(result, Tensor) else []


def _assemble(by_expert: dict[int, list[Product]]) -> Bodies:
    numbers = sorted(by_expert)
    sample = by_expert[numbers[0]][0]
    if numbers != list(range(len(numbers))):
        raise Refuse("some experts of a row are not used", sample.node)
    bodies = [_Body.of(by_expert[number]) for number in numbers]
    if len({body.signature for body in bodies}) > 1:
        raise Refuse("the experts of a row compute different things", sample.node)
    firsts = range(len(bodies[0].first))
    return Bodies(
        count=len(bodies),
        steps=tuple(step for expert, body in enumerate(bodies) for step in body.steps(expert)),
        nodes=frozenset(node for body in bodies for node in body.nodes),
        up=tuple(stack_of([body.first[i].weight for body in bodies]) for i in firsts),
        down=stack_of([body.down.weight for body in bodies]),
        activation=bodies[0].activation,
        up_bias=bias_stacks(
            [vector_stack_of([body.first[i].bias for body in bodies]) for i in firsts], sample.node
        ),
        down_bias=vector_stack_of([body.down.bias for body in bodies]),
        norm=bodies[0].down.norm and bodies[0].down.norm.region,
        norm_weight=norm_weight_of([body.down.norm for body in bodies]),
    )


@dataclass(frozen=True)
class _Body:
    """One expert: products of its rows, what comes between, and the last product."""

    first: list[Product]
    down: Product
    nodes: frozenset[fx.Node]
    activation: Region
    signature: str

    @classmethod
    def of(cls, products: list[Product]) -> "_Body":
        own = {p.node for p in products}
        later = [p for p in products if any(reaches(p.rows, node) for node in own - {p.node})]
        first = [p for p in products if p not in later]
        if len(later) != 1 or len({p.rows for p in first}) != 1:
            raise Refuse("an expert is not two products around an activation", products[-1].node)
        down, sources = later[0], {p.node for p in first}
        inner = between(down.operand, sources)
        if inner is None:
            raise Refuse("something else flows into an expert's activation", down.node)
        order = {node: i for i, node in enumerate(p.node for p in first)}
        region = side_by_side([p.node for p in first], down.operand, inner)
        biased = [p.bias is not None for p in (*first, down)]
        layout = [(p.weight.family, p.weight.transposed, p.node.target) for p in (*first, down)]
        text = f"{signature_of(down.operand, order, {})} {layout} {biased} {down.norm_signature}"
        products_own = down.last_nodes.union(*(p.nodes for p in first))
        return cls(first, down, products_own | inner, region, text)

    def steps(self, expert: int) -> list[Step]:
        """The body as steps."""
        products = [
            Step("up", (p.operand,), p.node, expert, place=i) for i, p in enumerate(self.first)
        ]
        hidden = self.down.operand
        act = Step("act", tuple(p.node for p in self.first), hidden, expert)
        normed = self.down.is_normed
        return [*products, act, Step("down", (hidden,), self.down.end, expert, normed=normed)]

"""Runs what surrounds experts with random functions in their place: numbers, then exact proofs."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_compile.rewrite.choices import choices_of, selection
from moe_compile.rewrite.dispatch_mask import Mask
from moe_compile.rewrite.expert_bodies import Bodies, Step
from moe_compile.rewrite.known_proofs import Spelling, Unspelled
from moe_compile.rewrite.normal_form import aten, value
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.stand_ins import StandIns, positive
from moe_compile.rewrite.weighted_sum import weighted_sum
from moe_compile.verify.in_float64 import InFloat64, default_float64, wide
from moe_compile.verify.oracle import Disproved, prove

_SHAPE_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
_Sizes = dict[Any, Any]
_FAILURES = (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError)
"""What foreign code raises where it depends on more than it is given."""

_DRAWS = ((5, False), (2, False), (3, True))
"""How many tokens a proof takes, and whether a token's picks are alike."""

_proven: set[tuple[str, int, bool]] = set()
"""What was run, on which draw, and gave what the canonical op gives."""


@dataclass(frozen=True)
class Cut:
    """A part of a graph that computes `root` from tokens, ids and one more value alone.

    Attributes:
        tokens, ids: [T, H]; [T, K] or [T].
        free: [T, ...], what the weights are computed from; None where they are constants.
        inner: the nodes between these and the root, in order.
        bodies: the experts among them.
        mask: where `ids` are a mask that picks follow from, what is known of it.
    """

    root: fx.Node
    tokens: fx.Node
    ids: fx.Node
    free: fx.Node | None
    inner: list[fx.Node]
    bodies: Bodies
    mask: Mask | None = None

    @functools.cached_property
    def spelling(self) -> Spelling | None:
        """What a proof runs of it; None where text does not say it."""
        try:
            return None if self.mask else _spelled(self)
        except Unspelled:
            return None


@dataclass(frozen=True)
class Form:
    """What the canonical form may be: which weights, and see `weighted_sum`."""

    weights: fx.Node
    full: bool
    weigh_input: bool
    identity: bool
    beyond: bool


def disproof(cut: Cut, form: Form) -> str | None:
    """Why the nodes are not the canonical op; None where they are."""
    distinct, said = cut.mask is not None or _are_distinct(cut.ids), _said(cut, form)
    for tokens, repeats in _DRAWS:
        if (repeats and distinct) or (said, tokens, repeats) in _proven:
            continue
        try:
            _prove_once(cut, form, tokens, repeats)
            if said is not None:
                _proven.add((said, tokens, repeats))
        except Disproved as problem:
            return f"the result is no weighted sum of the picked experts: {problem}"
        except _FAILURES as error:
            return _not_alone(error)
    return None


def _are_distinct(ids: fx.Node) -> bool:
    """Whether a token's picks differ, as top-k's do."""
    source = selection(ids)
    selects = source is not None and source.target in (aten.topk.default, aten.sort.default)
    return selects or per_row(ids) == 1


def per_row(node: fx.Node) -> int:
    """How many values a row has."""
    return value(node).shape[1:].numel()


def flows_into(node: fx.Node) -> list[fx.Node]:
    """Whose values a node's value depends on; of some tensors it is only the shape."""
    if _is_known_size(node):
        return []
    return node.all_input_nodes[node.target in _SHAPE_ONLY :]


def is_size(node: fx.Node) -> bool:
    """Whether the node is a size, not a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int)) or (
        node.target is aten.sym_size.int
    )


def agrees(cut: Cut, forms: Iterable[Form]) -> Iterator[Form]:
    """The forms that give what the nodes give on random numbers: worth an exact proof.

    Raises:
        Refuse: the nodes cannot be run on their own.
    """
    spelled = list(forms)
    known = [form for form in spelled if (_said(cut, form), *_DRAWS[0]) in _proven]
    yield from known
    run = functools.partial(_in_numbers, inputs=_inputs(cut, *_DRAWS[0]))
    try:
        expected = run(_before(cut))
    except _FAILURES as error:
        raise Refuse(_not_alone(error), cut.root) from None
    fits: dict[Form, bool] = {}
    for form in spelled:
        if form not in fits:
            alike = [other for other in spelled if replace(other, weights=form.weights) == form]
            results = run(_after(cut, *alike)).chunk(len(alike))
            fits |= {each: _is_close(y, expected) for each, y in zip(alike, results, strict=True)}
        if fits[form]:
            yield form


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-8)


def _in_numbers(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """The result in float64; whoever goes on with it has gradients, and a proof needs them."""
    with default_float64(), torch.no_grad():
        return function(*inputs)


def _not_alone(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"what is around the experts cannot be run on its own: {first_line}"


def _prove_once(cut: Cut, form: Form, tokens: int, repeats: bool) -> None:
    with InFloat64():
        inputs = _inputs(cut, tokens, repeats)
    prove(_before(cut), _after(cut, form), inputs)


def _said(cut: Cut, form: Form) -> str | None:
    """All that is run to prove a form, and on what; None where text does not say it."""
    spelling, weights = cut.spelling, form.weights
    if spelling is None or weights not in spelling.numbers:
        return None
    free, ids = cut.free and value(cut.free).shape[1:], value(cut.ids)
    return spelling.said(
        *(cut.root, weights, form.full, form.weigh_input, form.identity, form.beyond),
        *(choices_of(cut.ids, cut.bodies.count), ids.shape[1:], ids.dtype, free),
        *(value(cut.tokens).shape, StandIns.sizes(cut.bodies, value(cut.tokens).shape[1])),
    )


def _spelled(cut: Cut) -> Spelling:
    """The nodes as they are run."""
    spelling = Spelling(cut.ids, cut.tokens, cut.free)
    nodes, results = _steps(cut)
    for node in nodes:
        if node in results:
            spelling.step(results[node])
        elif _is_known_size(node):
            spelling.size(node)
        else:
            spelling.call(node)
    return spelling


def _inputs(cut: Cut, tokens: int, repeats: bool) -> list[Tensor]:
    """Random ids, tokens, free values and functions."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = value(cut.tokens).shape[1]
    free = (1,) if cut.free is None else (tokens, *value(cut.free).shape[1:])
    return [
        _random_ids(cut, tokens, repeats, generator),
        positive((tokens, hidden), generator),
        positive(free, generator),
        *StandIns.draw(cut.bodies, hidden, generator),
    ]


def _random_ids(cut: Cut, tokens: int, repeats: bool, generator: torch.Generator) -> Tensor:
    """Picks of each token, or a mask; where picks may repeat, the first token's are all alike."""
    if cut.mask is not None:
        return cut.mask.draw(tokens, generator)
    chance = torch.rand(tokens, choices_of(cut.ids, cut.bodies.count), generator=generator)
    ids = torch.multinomial(chance, per_row(cut.ids), replacement=repeats, generator=generator)
    ids[0] = ids[0, 0].clone() if repeats else ids[0]
    return ids.reshape(tokens, *value(cut.ids).shape[1:]).to(value(cut.ids).dtype)


def _before(cut: Cut) -> Callable[..., Tensor]:
    """The nodes as they stand, with a random function for each body."""
    steps, results = _steps(cut)
    reads = {n: results[n].reads if n in results else n.all_input_nodes for n in steps}
    added = _only_added(cut.root, reads)

    def run(ids: Tensor, x: Tensor, free_value: Tensor, *functions: Tensor) -> Tensor:
        own = StandIns.of(cut.bodies, functions)
        env: dict[Any, Any] = {cut.ids: ids, cut.tokens: x, cut.free: free_value}
        sizes = _sizes(cut, len(x))

        def compute(node: fx.Node) -> None:
            if _adds_no_rows(node, env):
                env[node] = env[node.args[0]]
                return
            for source in reads[node]:
                if source in added and source not in env:
                    compute(source)
            known = node in results
            env[node] = _cut_off(own.run(results[node], env) if known else _step(node, env, sizes))

        for node in steps:
            if node not in added:
                compute(node)
        return env[cut.root]

    return run


def _steps(cut: Cut) -> tuple[list[fx.Node], dict[fx.Node, Step]]:
    """The nodes that are run, in order; and what the experts' part of them are."""
    results = {step.result: step for step in cut.bodies.steps}
    calls = [node for node in cut.inner if node.op == "call_function"]
    return [node for node in calls if node not in cut.bodies.nodes or node in results], results


def _only_added(root: fx.Node, reads: dict[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    """The nodes that nothing reads but what adds their rows, and what leads to them alone."""
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in reads}
    for node, sources in reads.items():
        for source in sources:
            if source in readers:
                readers[source].append(node)
    found = set[fx.Node]()
    for node in reversed(reads):
        alone = all(user in found or _adds_rows_of(user, node) for user in readers[node])
        if alone and node is not root and node.target is not aten.index_add.default:
            found.add(node)
    return found


def _adds_rows_of(user: fx.Node, node: fx.Node) -> bool:
    return user.target is aten.index_add.default and node not in user.args[:3]


def _adds_no_rows(node: fx.Node, env: dict[Any, Any]) -> bool:
    """Loops add rows for every expert, and most get none."""
    if node.target is not aten.index_add.default or node.args[0] not in env:
        return False
    index = env.get(node.args[2])
    return isinstance(index, Tensor) and not index.numel()


def _cut_off(result: Any) -> Any:
    """The same; nothing flows back through no elements, such as the rows of an expert without."""
    is_empty = isinstance(result, Tensor) and result.requires_grad and not result.numel()
    return result.detach() if is_empty else result


def _after(cut: Cut, *forms: Form) -> Callable[..., Tensor]:
    """The canonical op on the same functions.

    Of forms that differ in their weights alone, the results are below each other: what becomes of a
    token does not depend on others, so that one run does for all.
    """

    def run(ids: Tensor, x: Tensor, free_value: Tensor, *functions: Tensor) -> Tensor:
        own = StandIns.of(cut.bodies, functions)
        env: dict[Any, Any] = {cut.ids: ids, cut.tokens: x, cut.free: free_value}
        sizes, form = _sizes(cut, len(x)), forms[0]
        picks = ids if cut.mask is None else cut.mask.ids(ids)
        return weighted_sum(
            _below([x for _ in forms]),
            _below([picks for _ in forms]),
            _below([_value_of(each.weights, env, sizes) for each in forms]),
            own.up,
            own.down,
            own.between,
            own.up_bias,
            own.down_bias,
            norm=None if own.norm is None else operator.mul,
            norm_weight=own.norm,
            transposed=True,
            weigh_input=form.weigh_input,
            full=form.full,
            identity=form.identity,
            beyond=form.beyond,
        )

    return run


def _below(parts: list[Tensor]) -> Tensor:
    """The rows of all parts, each with a row or a number for every token."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.reshape(len(part), -1) for part in parts])


def _is_known_size(node: fx.Node) -> bool:
    """Whether it is a size that the number of tokens gives, and no count of rows."""
    return is_size(node) and not free_unbacked_symbols(value(node))


def _value_of(node: fx.Node, env: dict[Any, Any], sizes: _Sizes) -> Any:
    """A node's value, from those that are known."""
    if node not in env:
        for source in flows_into(node):
            _value_of(source, env, sizes)
        env[node] = _step(node, env, sizes)
    return env[node]


def _step(node: fx.Node, env: dict[Any, Any], sizes: _Sizes) -> Any:
    """Runs one node; a size that nothing known has is computed from the number of tokens."""
    if _is_known_size(node):
        return _size(value(node), sizes)

    def real(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument] if argument in env else _shaped_like(value(argument), sizes)
        if isinstance(argument, torch.SymInt):
            return _size(argument, sizes)
        if isinstance(argument, torch.dtype):
            return wide(argument)
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    is_leaf: Callable[[Any], bool] = lambda a: isinstance(a, fx.Node)  # noqa: E731
    args, kwargs = pytree.tree_map(real, (tuple(node.args), dict(node.kwargs)), is_leaf=is_leaf)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _shaped_like(fake: Tensor, sizes: _Sizes) -> Tensor:
    shape: list[Any] = list(fake.shape)
    return torch.zeros([_size(size, sizes) for size in shape], dtype=torch.float64)


def _sizes(cut: Cut, tokens: int) -> _Sizes:
    """Values of the symbolic sizes: one of those that count tokens has all, the others are one."""
    count: Any = value(cut.tokens).shape[0]
    *others, last = sorted(count.node.expr.free_symbols, key=str)
    return dict.fromkeys(others, 1) | {last: tokens}


def _size(size: Any, sizes: _Sizes) -> int:
    return size if isinstance(size, int) else int(size.node.expr.xreplace(sizes))

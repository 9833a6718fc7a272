"""Finds idioms in a graph: first loosely, then exactly.

The loose search walks a pattern's template and the graph together, blind to casts, reshapes,
sizes and operand order, and so finds candidates of any rank and dtype. Each candidate is then
proved: `before` is traced again on the candidate's own inputs, and that graph must equal the
candidate node for node, literal for literal. Nothing is changed here.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from moe_compile.capture.boundary import enter, exit
from moe_compile.capture.trace import Mode, autocast, trace_function
from moe_compile.rewrite.normal_form import aten, is_aten, normalize, schema_arguments
from moe_compile.rewrite.pattern import REGION, Match, Pattern, Template, output_value, templates
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import capture, cut

Env = Mapping[Any, Any]

DEFAULT_MODE = Mode()

_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default}
_TRANSPARENT = {aten.to.dtype, aten.reshape.default, aten.expand.default}
_SIZED = {aten.reshape.default, aten.expand.default, aten.arange.default, aten.arange.start_step}


@dataclass
class NearMiss:
    """How far the best failed attempt of a pattern got, and what stopped it.

    Attributes:
        matched: template nodes that fitted, of `total`.
        kind, file: of the pattern.
        stage: how far it got, where that is no count of operations.
        node: the graph node that did not fit; `source`: its line in the model's source.
        remedy: what would make it match, where that is more than another pattern.
    """

    pattern: str
    kind: str = ""
    file: str = ""
    stage: str = ""
    matched: int = -1
    total: int = 0
    node: str = ""
    reason: str = ""
    source: str | None = None
    remedy: str | None = None
    depth: int = field(default=0, repr=False)
    calls: tuple[int, ...] = field(default=(), repr=False)

    def share(self) -> float:
        """How much of the pattern fitted, from 0 to 1."""
        return max(self.matched, 0) / max(self.total, 1)

    def is_close(self) -> bool:
        """Whether it is more than a sum or a product that many idioms have."""
        return self.matched > 2 or self.share() >= 0.5

    def progress(self) -> str:
        """How far it got, in words."""
        return self.stage or f"{self.matched} of {self.total} operations fit"

    @classmethod
    def of(cls, pattern: Pattern) -> "NearMiss":
        """Of a pattern that has not been tried yet."""
        return cls(pattern.name, pattern.kind, type(pattern).__module__.replace(".", "/") + ".py")

    def offer(
        self,
        matched: int,
        total: int,
        node: Any,
        reason: str,
        depth: int = 0,
        remedy: str | None = None,
    ) -> None:
        """Keeps the attempt if it got further than the one before."""
        if (matched, depth, -total) > (self.matched, self.depth, -self.total):
            self.matched, self.total, self.reason, self.depth = matched, total, reason, depth
            self.node, self.source, self.remedy = str(node), source_of(node), remedy
            self.calls = node.meta.get("calls", ()) if isinstance(node, fx.Node) else ()


def source_of(node: Any) -> str | None:
    """The line of the model's source that a node comes from; of a parameter, where it is used."""
    if not isinstance(node, fx.Node):
        return None
    lines = (each.meta.get("source") for each in (node, *node.users))
    return next((line for line in lines if line is not None), None)


def find(
    pattern: Pattern, graph: fx.Graph, miss: NearMiss, mode: Mode = DEFAULT_MODE
) -> Iterator[Match]:
    """The pattern's matches, last node first; the caller may rewrite each as it comes.

    Args:
        mode: the mode that the graph was captured in.
        miss: gets what was refused or came close.
    """
    for root in reversed(list(graph.nodes)):
        if root._erased or root.op != "call_function" or root.target in (enter, exit):
            continue
        closest = replace(miss)
        match = _match_at(pattern, root, miss, mode)
        if match is not None:
            vars(miss).update(vars(closest))  # other spellings of what did match are no misses
            yield match


def _match_at(pattern: Pattern, root: fx.Node, miss: NearMiss, mode: Mode) -> Match | None:
    for template in templates(pattern):
        if root.target not in _root_targets(template):
            continue
        search = _Search(template, miss)
        for env in search.unify(template.root, root, {}):
            for top in (root, *_casts_of(root)):
                depth = 0
                try:
                    match = _prove(template, env, top, mode)
                    depth = len(match.nodes)
                    check_escapes(match)
                    pattern.check(match)
                except Refuse as refusal:
                    node, depth = refusal.node or top, max(depth, refusal.depth)
                    reason, remedy = refusal.reason, refusal.remedy
                    miss.offer(search.size, search.size, node, reason, depth, remedy)
                    continue
                return match
    return None


def _root_targets(template: Template) -> list[Any]:
    """What a match may end in: the template's last step, and the one before a cast."""
    root = template.root
    return [root.target, _source(root).target] if root.target is aten.to.dtype else [root.target]


def _casts_of(root: fx.Node) -> list[fx.Node]:
    """Casts of a root: the idiom's own last step, where its example dtypes made it a no-op."""
    return [user for user in root.users if user.target is aten.to.dtype]


class _Search:
    """The loose walk of one template; every way to fit it is yielded."""

    def __init__(self, template: Template, miss: NearMiss) -> None:
        self.template = template
        self.miss = miss
        self.size = template.size

    def unify(self, pattern: fx.Node, node: Any, env: Env) -> Iterator[Env]:
        """Ways to extend `env` so that the template's node stands for the graph's node."""
        if not isinstance(node, fx.Node):
            return self._fail(env, node, "a literal stands where a value is expected")
        if pattern in env:
            return iter([env]) if env[pattern] is node else self._fail(env, node, "another value")
        if pattern.op == "placeholder":
            return iter([{**env, pattern: node}])
        return self._unify_call(pattern, node, env)

    def _unify_call(self, pattern: fx.Node, node: fx.Node, env: Env) -> Iterator[Env]:
        if pattern.target is REGION:
            yield from self._unify_region(pattern, node, env)
            return
        if pattern.target is node.target:
            # Before its operands, so that a miss below counts what fitted above.
            yield from self._unify_arguments(pattern, node, {**env, pattern: node})
        if pattern.target in _TRANSPARENT:
            yield from self.unify(_source(pattern), node, env)
        elif node.target in _TRANSPARENT:
            yield from self.unify(pattern, node.args[0], env)
        elif pattern.target is not node.target:
            self._fail(env, node, f"expected {pattern.target}, found {node.target}")

    def _unify_region(self, pattern: fx.Node, node: fx.Node, env: Env) -> Iterator[Env]:
        source = _source(pattern)
        for candidate in _ancestors(node):
            nodes = cut(candidate, node)
            if nodes is None or candidate.target is not source.target:
                continue
            for extended in self.unify(source, candidate, env):
                yield {**extended, pattern: (candidate, node, nodes)}

    def _unify_arguments(self, pattern: fx.Node, node: fx.Node, env: Env) -> Iterator[Env]:
        wanted, given = _arguments(pattern), _arguments(node)
        for order in _orders(pattern, given):
            yield from self._unify_lists(list(wanted.values()), order, node, env)

    def _unify_lists(
        self, wanted: list[Any], given: list[Any], node: fx.Node, env: Env
    ) -> Iterator[Env]:
        if len(wanted) != len(given):
            return self._fail(env, node, "another number of operands")
        if not wanted:
            return iter([env])
        heads = self._unify_argument(wanted[0], given[0], node, env)
        return itertools.chain.from_iterable(
            self._unify_lists(wanted[1:], given[1:], node, extended) for extended in heads
        )

    def _unify_argument(self, wanted: Any, given: Any, node: fx.Node, env: Env) -> Iterator[Env]:
        if _is_tensor(wanted):
            return self.unify(wanted, given, env)
        if isinstance(wanted, (list, tuple)) and any(isinstance(w, fx.Node) for w in wanted):
            if not isinstance(given, (list, tuple)):
                return self._fail(env, node, "a single operand where a list is expected")
            return self._unify_lists(list(wanted), list(given), node, env)
        if _is_literal(wanted) and wanted in self.template.literals:
            if not isinstance(given, (int, float)):
                return self._fail(env, node, "a computed value where a literal is expected")
            return iter([{**env, self.template.literals[wanted]: given}])
        if isinstance(wanted, float) and given != wanted:
            return self._fail(env, node, f"expected the literal {wanted}, found {given}")
        return iter([env])

    def _fail(self, env: Env, node: Any, reason: str) -> Iterator[Env]:
        matched = sum(isinstance(key, fx.Node) and key.op == "call_function" for key in env)
        self.miss.offer(matched, self.size, node, reason)
        return iter(())


def _prove(template: Template, env: Env, root: fx.Node, mode: Mode) -> Match:
    """Traces `before` on the candidate's own inputs and compares exactly."""
    bindings = _bindings(template, env)
    nodes = _equal_nodes(template, bindings, root, mode)
    return Match(template.pattern, bindings, template.choice, root, nodes)


def _bindings(template: Template, env: Env) -> dict[str, Any]:
    bindings: dict[str, Any] = dict.fromkeys(template.absent)
    for key, bound in env.items():
        if isinstance(key, str):
            bindings[key] = bound
        elif key in template.inputs:
            bindings[template.inputs[key]] = bound
        elif key.target is REGION:
            bindings[_region_name(template)] = capture(*bound)
    return bindings


def _region_name(template: Template) -> str:
    from moe_compile.rewrite.pattern import signature

    return next(name for name, kind in signature(template.pattern).items() if kind == "region")


def _equal_nodes(
    template: Template, bindings: dict[str, Any], root: fx.Node, mode: Mode
) -> frozenset[fx.Node]:
    """The nodes of the candidate, each equal to one of `before` on the bound inputs."""
    tensors = {name: node for name, node in bindings.items() if isinstance(node, fx.Node)}
    fixed = {name: bound for name, bound in bindings.items() if name not in tensors}
    values = {name: node.meta["val"] for name, node in tensors.items()}
    graph = _retrace(template, values, fixed, mode)
    if isinstance(graph, str):
        raise Refuse(f"the idiom does not run on these inputs: {graph}", root)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    env = dict(zip(placeholders, tensors.values(), strict=True))
    _compare(output_value(graph), root, env)
    given = set(tensors.values())
    return frozenset(node for node in env.values() if node not in given)


def _retrace(
    template: Template, values: dict[str, Tensor], fixed: dict[str, Any], mode: Mode
) -> fx.Graph | str:
    """`before` on the given inputs, in normal form; or why it does not run on them."""
    fake = detect_fake_mode(list(values.values()))
    assert fake is not None, "a captured graph holds fake values"
    # The layers of a model repeat the same few idioms; the mode lives as long as their captures.
    known: dict[str, fx.Graph | str] = vars(fake).setdefault("moe_compile_retraced", {})
    key = (
        mode.autocast,
        template.pattern.name,
        tuple(template.choice.items()),
        tuple((n, str(tuple(v.shape)), v.dtype, v.device) for n, v in values.items()),
        tuple(fixed.items()),
    )
    if str(key) in known:
        return known[str(key)]

    def before(*inputs: Tensor) -> Tensor:
        named = dict(zip(values, inputs, strict=True))
        return template.pattern.before(**named, **fixed, **template.choice)

    inputs = list(values.values())
    try:
        with fake, autocast(mode, inputs[0].device):
            graph = trace_function(before, inputs)
        normalize(graph)
        known[str(key)] = graph
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        known[str(key)] = str(error)
    return known[str(key)]


def _compare(wanted: fx.Node, node: Any, env: dict[fx.Node, fx.Node]) -> None:
    """Records in `env` that two nodes are the same computation, or refuses."""
    if wanted in env:
        if env[wanted] is not node:
            raise Refuse(f"{node} is not the value that the idiom uses there", node)
        return
    if not isinstance(node, fx.Node) or wanted.target is not node.target:
        raise Refuse(f"expected {wanted.target}, found {_describe(node)}", node)
    given = _arguments(node)
    failure: Refuse | None = None
    for order in _orders(wanted, given):
        trial = dict(env)
        try:
            for name, left, right in zip(given, _arguments(wanted).values(), order, strict=True):
                _compare_argument(wanted, node, name, left, right, trial)
        except Refuse as refusal:
            refusal.depth = max(refusal.depth, len(trial))
            if failure is None or refusal.depth > failure.depth:
                failure = refusal
            continue
        env.update(trial)
        env[wanted] = node
        return
    assert failure is not None
    raise failure


def _compare_argument(
    wanted: fx.Node, node: fx.Node, name: str, left: Any, right: Any, env: dict[fx.Node, fx.Node]
) -> None:
    if name in ("size", "shape") and wanted.target in _SIZED:
        if _shape(wanted) != _shape(node):
            raise Refuse(f"{node} has shape {_shape(node)}, not {_shape(wanted)}", node)
        return
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            raise Refuse("another number of operands", node)
        for a, b in zip(left, right, strict=True):
            _compare_argument(wanted, node, name, a, b, env)
        return
    if isinstance(left, fx.Node) and _is_tensor(left):
        _compare(left, right, env)
        return
    if _is_tensor(right) or _literal(left) != _literal(right):
        raise Refuse(f"expected {name}={_literal(left)}, found {_literal(right)}", node)


def check_escapes(match: Match) -> None:
    """Refuses a match whose inner values are used elsewhere: they would have to stay.

    So would a custom autograd function, of which the trace has the forward only.

    An inner value may be an output of the owner that nothing in the unit uses (attention weights):
    the installed forward returns None for it, and steps aside where somebody listens.
    """
    for node in match.nodes:
        if node.meta.get("function"):
            name = node.meta["function"]
            reason = f"{name} is a custom autograd function: its backward would be lost"
            refusal = Refuse(reason, node, remedy="write it in torch's own operations")
            refusal.depth = len(node.graph.nodes)  # no other spelling would fit better
            raise refusal
    crossed, owner = crossed_calls(match), owner_calls(match)[-1]
    for node in match.nodes - {match.root}:
        for user in node.users:
            if user in match.nodes or (user.target in (enter, exit) and user.args[0] in crossed):
                continue
            if user.target is aten.sym_size.int:
                continue
            if user.target is exit and user.args[0] == owner and not user.meta["observed"]:
                continue
            reason = f"the inner value {node} is used by {user} outside the idiom"
            raise Refuse(reason, node, remedy=f"take the value away from {source_of(user) or user}")


def crossed_calls(match: Match) -> frozenset[int]:
    """The calls that the match reaches into, below its owner's, or that only pass a value on."""
    depth = len(owner_calls(match))
    reached = {call for node in match.nodes for call in node.meta["calls"][depth:]}
    users = {user for node in match.nodes - {match.root} for user in node.users}
    idle = (u for u in users if u.target is enter and _is_idle(u))
    return frozenset(reached.union(*(user.meta["calls"][depth:] for user in idle)))


def _is_idle(begins: fx.Node) -> bool:
    """Whether a call computes nothing, as one of a dropout that is off."""
    node = begins.next
    while node.target in (enter, exit) and node.args[0] != begins.args[0]:
        node = node.next
    return node.target is exit and bool(node.args[0] == begins.args[0])


def owner_calls(match: Match) -> tuple[int, ...]:
    """The calls that hold every node of the match, outermost first; the last is its owner."""
    chains = [node.meta["calls"] for node in match.nodes]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*chains, strict=False))
    return tuple(level[0] for level in shared)


def _arguments(node: fx.Node) -> dict[str, Any]:
    if is_aten(node):
        return schema_arguments(node)
    return {str(i): argument for i, argument in enumerate(node.args)} | dict(node.kwargs)


def _orders(pattern: fx.Node, given: dict[str, Any]) -> Iterator[list[Any]]:
    values = list(given.values())
    yield values
    if pattern.target in _COMMUTATIVE:
        yield [values[1], values[0], *values[2:]]


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """The node's producers, nearest first."""
    seen, level = {node}, [node]
    while level and len(seen) < 64:
        level = [n for m in level for n in m.all_input_nodes if n not in seen]
        seen.update(level)
        yield from dict.fromkeys(level)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _shape(node: fx.Node) -> str:
    return str(tuple(node.meta["val"].shape))


def _literal(argument: Any) -> Any:
    """A literal or symbolic size, comparable."""
    if isinstance(argument, fx.Node):
        argument = argument.meta["val"]
    return str(argument) if isinstance(argument, (torch.SymInt, torch.SymFloat)) else argument


def _is_tensor(argument: Any) -> bool:
    """Whether the argument is a node that computes tensors."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta["val"], (Tensor, tuple, list))


def _is_literal(argument: Any) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def _describe(node: Any) -> str:
    return str(node.target) if isinstance(node, fx.Node) else repr(node)

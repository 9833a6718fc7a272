"""Cuts one module call out of a unit's graph, as a graph of that module alone.

Inside it, calls of child modules that no rewrite reached into become `call_module` again, so that
their hooks, LoRA and own rewrites stay in force; parameters become attributes of the owner, read at
every call; sizes are read off the owner's own inputs.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_compile.capture.boundary import ModuleCall, enter, exit
from moe_compile.capture.untouched import Untouched, UntouchedAttribute
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph

_OPERATORS: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
}


@dataclass
class Cut:
    """A module call as a graph of its own.

    Attributes:
        path: the owner's name inside the unit.
        call: how the owner was called; its tensor inputs are the graph's placeholders, in order.
        graph: get_attr and call_module targets are names inside the owner.
        conditions: a graph on the same placeholders that returns whether the sizes fit, or None.
        crossed: names inside the owner of the children that are no longer called.
        drops_outputs: whether an output that nothing in the unit used is returned as None.
        made_by: the (pass, pattern) pairs of the rewrites inside.
    """

    path: str
    call: ModuleCall
    graph: fx.Graph
    conditions: fx.Graph | None = None
    crossed: tuple[str, ...] = ()
    drops_outputs: bool = False
    made_by: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def cut(unit: UnitGraph, index: int) -> Cut:
    """The call with number `index` of a unit's graph as a function of its own arguments.

    Raises:
        Refuse: the call reads something that is neither its argument nor its parameter, or holds a
            custom autograd function, whose backward the trace has lost.
    """
    return _Cutter(unit, index).run()


class _Cutter:
    def __init__(self, unit: UnitGraph, index: int) -> None:
        self.unit, self.index = unit, index
        self.call = unit.calls[index]
        assert self.call.path is not None
        self.path = self.call.path
        self.graph = fx.Graph()
        self.still_made = {n.args[0] for n in unit.graph.nodes if n.target is enter}
        self.env: dict[fx.Node, Any] = {}
        self.children: dict[int, fx.Node] = {}
        self.counts: dict[Any, fx.Node] = {}  # numbers that depend on data

    def run(self) -> Cut:
        first, last, inside = self._span()
        for node in first.args[1:]:
            self._add_input(node)
        for node in inside:
            self._copy(node)
        result = Cut(self.path, self.call, self.graph, made_by=self._made_by(inside))
        self._check_leaves()
        self.graph.output(self._output(last, result))
        result.conditions = self._conditions(inside)
        result.crossed = self._crossed(inside)
        return result

    def _span(self) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
        nodes = [n for n in self.unit.graph.nodes if self.index in n.meta.get("calls", ())]
        first = next(n for n in nodes if n.target is enter and n.args[0] == self.index)
        last = next(n for n in nodes if n.target is exit and n.args[0] == self.index)
        return first, last, [n for n in nodes if n not in (first, last)]

    def _add_input(self, node: Any) -> None:
        placeholder = self.graph.placeholder(f"input_{len(self.graph.nodes)}")
        placeholder.meta = {"val": node.meta["val"]}
        self.env.setdefault(node, placeholder)

    def _copy(self, node: fx.Node) -> None:
        child = self._kept_child(node)
        if child is not None:
            if node.target is enter and node.args[0] == child:
                self.children[child] = self._call_child(self.unit.calls[child], node)
            if node.target is exit and node.args[0] == child:
                self._take_outputs(self.unit.calls[child], node, self.children[child])
            return
        if node.target in (enter, exit) or _is_read_off(node.meta["val"]):
            return
        if node.op == "get_attr":
            raise Refuse("its code holds a tensor that is no parameter or buffer", node)
        self._check_real(node)
        copy = self.graph.node_copy(node, self._resolve)
        copy.meta = dict(node.meta)
        self.env[node] = copy
        if isinstance(node.meta["val"], torch.SymInt):
            self.counts[node.meta["val"].node.expr] = copy

    def _kept_child(self, node: fx.Node) -> int | None:
        """The outermost call below the owner that the node lies in and that is still made."""
        calls = node.meta["calls"]
        below = calls[calls.index(self.index) + 1 :]
        return next((call for call in below if call in self.still_made), None)

    def _check_real(self, node: fx.Node) -> None:
        for call in node.meta["calls"]:
            if self.unit.calls[call].path is None:
                label = self.unit.calls[call].label
                raise Refuse(f"{label} is a custom autograd function: its backward would be lost")

    def _check_leaves(self) -> None:
        """Refuses code that leaves something behind, or of which the graph has a part."""
        if self.call.writes:
            raise Refuse("its code changes its argument in place", remedy="change a copy of it")
        for i, call in enumerate(self.unit.calls):
            if self._is_inlined(i) and call.sampled:
                reason = "its experts have dropout, which draws random numbers"
                raise Refuse(reason, remedy="set the experts' dropout to 0")
            if self._is_inlined(i) and call.leaves:
                reason = f"its code leaves {call.leaves[0]} behind for other code to read"
                raise Refuse(reason, remedy="return it, or give the experts a module of their own")

    def _call_child(self, call: ModuleCall, begins: fx.Node) -> fx.Node:
        if call.path is None:
            raise Refuse(f"{call.label} is a custom autograd function: its backward would be lost")
        leaves = list(call.inputs)
        for position, node in zip(call.tensor_inputs, begins.args[1:], strict=True):
            leaves[position] = self._resolve(node)
        for i, leaf in enumerate(leaves):
            leaves[i] = self._plain(leaf)
        args, kwargs = pytree.tree_unflatten(leaves, call.input_spec)
        kwargs = {name: value for name, value in kwargs.items() if not _dropped(value)}
        return self.graph.call_module(_inside(self.path, call.path), args, kwargs)

    def _plain(self, leaf: Any) -> Any:
        if isinstance(leaf, UntouchedAttribute):
            where = object.__getattribute__(leaf, "where")
            return self.graph.get_attr(_inside(self.path, where))
        if not isinstance(leaf, torch.SymInt):
            return leaf
        return self.counts.get(leaf.node.expr) or self._size(leaf.node.expr)

    def _take_outputs(self, call: ModuleCall, ends: fx.Node, result: fx.Node) -> None:
        assert call.output_spec is not None
        positions = dict(zip(call.tensor_outputs, ends.args[1:], strict=True))
        numbered = pytree.tree_unflatten(list(range(len(call.outputs))), call.output_spec)
        for keys, number in pytree.tree_flatten_with_path(numbered)[0]:
            if number in positions:
                output: Any = positions[number]
                self.env[output] = self._follow(result, keys)
            elif isinstance(call.outputs[number], torch.SymInt):
                self.counts[call.outputs[number].node.expr] = self._follow(result, keys)

    def _follow(self, node: fx.Node, keys: Any) -> fx.Node:
        for key in keys:
            if isinstance(key, pytree.GetAttrKey):
                node = self.graph.call_function(getattr, (node, key.name))
            else:
                item = key.idx if isinstance(key, pytree.SequenceKey) else key.key
                node = self.graph.call_function(operator.getitem, (node, item))
        return node

    def _resolve(self, node: Any) -> Any:
        if node in self.env:
            return self.env[node]
        if node.op == "get_attr":
            self.env[node] = self.graph.get_attr(_inside(self.path, node.target))
            self.env[node].meta = dict(node.meta)
            return self.env[node]
        value = node.meta["val"]
        if isinstance(value, int):
            return value
        if isinstance(value, torch.SymInt):
            return self._plain(value)
        raise Refuse(f"{self.path or 'the layer'} reads {node}, which is not its argument", node)

    def _size(self, expression: Any) -> Any:
        """A symbolic size, computed from the sizes of the owner's inputs."""
        known: dict[Any, fx.Node] = {}
        for placeholder in [n for n in self.graph.nodes if n.op == "placeholder"]:
            for dim, size in enumerate(placeholder.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    known.setdefault(size.node.expr, (placeholder, dim))  # type: ignore[arg-type]
        named = {expr: sympy.Symbol(f"known_{i}") for i, expr in enumerate(known)}
        for expr in sorted(named, key=lambda e: -len(e.args)):
            expression = expression.subs(expr, named[expr])
        sources = {symbol: known[expr] for expr, symbol in named.items()}
        return self._emit(expression, sources)

    def _emit(self, expression: Any, sources: dict[Any, Any]) -> Any:
        if expression in sources:
            placeholder, dim = sources[expression]
            return self.graph.call_method("size", (placeholder, dim))
        if expression in (sympy.true, sympy.false):
            return expression is sympy.true
        if expression.is_Integer:
            return int(expression)
        function = _OPERATORS.get(expression.func)
        if function is None:
            raise Refuse(f"the size {expression} cannot be read off the arguments")
        parts = [self._emit(part, sources) for part in expression.args]
        result = parts[0]
        for part in parts[1:]:
            result = self.graph.call_function(function, (result, part))
        return result

    def _output(self, last: fx.Node, result: Cut) -> Any:
        assert self.call.output_spec is not None
        leaves = list(self.call.outputs)
        for position, node in zip(self.call.tensor_outputs, last.args[1:], strict=True):
            result.drops_outputs |= node is None
            leaves[position] = None if node is None else self._resolve(node)
        return pytree.tree_unflatten(leaves, self.call.output_spec)

    def _conditions(self, inside: list[fx.Node]) -> fx.Graph | None:
        """What the inlined code asked of sizes, as a graph that answers it for new inputs."""
        asked = [
            question
            for i, call in enumerate(self.unit.calls)
            if self._is_inlined(i)
            for question in call.conditions
        ]
        if not asked:
            return None
        body, self.graph = self.graph, fx.Graph()
        for node in body.nodes:
            if node.op == "placeholder":
                self.graph.placeholder(node.name).meta = dict(node.meta)
        answers: list[Any] = []
        for expression, answer in dict.fromkeys(asked):
            now = self._size(expression)
            # Compared with `not` rather than `==`: Dynamo may ask with symbolic sizes.
            answers.append(now if answer else self.graph.call_function(operator.not_, (now,)))
        self.graph.output(tuple(answers))
        conditions, self.graph = self.graph, body
        return conditions

    def _is_inlined(self, call: int) -> bool:
        """Whether its code becomes part of the graph."""
        return call == self.index or (call not in self.still_made and self._below(call))

    def _below(self, call: int | None) -> bool:
        while call is not None and call != self.index:
            call = self.unit.calls[call].parent
        return call == self.index

    def _crossed(self, inside: list[fx.Node]) -> tuple[str, ...]:
        crossed = {call for node in inside for call in node.meta.get("crosses", ())}
        paths = [self.unit.calls[call].path for call in crossed]
        return tuple(sorted(_inside(self.path, path) for path in paths if path is not None))

    def _made_by(self, inside: list[fx.Node]) -> list[tuple[str, str]]:
        made = [n.meta["made_by"] for n in inside if "made_by" in n.meta]
        return list(dict.fromkeys(made))


def _dropped(value: Any) -> bool:
    """Whether a keyword is a stand-in that nothing looked at."""
    leaves = pytree.tree_leaves(value)
    return any(isinstance(leaf, Untouched) for leaf in leaves)


def _is_read_off(value: Any) -> bool:
    """Whether it is a size that the arguments' shapes give: not one that depends on their data."""
    return isinstance(value, torch.SymInt) and not free_unbacked_symbols(value)


def _inside(owner: str, path: str) -> str:
    """A module or parameter's name seen from its owner."""
    prefix = f"{owner}." if owner else ""
    if not path.startswith(prefix):
        raise Refuse(f"{owner} uses {path}, which belongs to another module")
    return path[len(prefix) :]

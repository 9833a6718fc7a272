"""Turns a cut graph into a plain Python function.

The function is ordinary source, kept in `linecache`: it shows up in tracebacks, Dynamo traces it
like code that somebody wrote, and every module of a group shares it.
"""

import builtins
import itertools
import keyword
import linecache
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_compile.install.guards import EMITTED
from moe_compile.rewrite.region import Region

_INFIX: dict[Any, str] = {
    operator.add: "+",
    operator.mul: "*",
    operator.eq: "==",
    operator.ne: "!=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.lt: "<",
    operator.le: "<=",
}
_serial = itertools.count()

OWNER = object()
"""Stands in a graph for the module that the function is a method of."""


def emit(graph: fx.Graph, name: str, *, method: bool = True) -> Callable[..., Any]:
    """A function of the graph's placeholders, in order; a method if it reads attributes."""
    writer = _Writer({node.name for node in graph.nodes})
    source = writer.function(graph, name, method)
    filename = f"<moe_compile {name} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {**writer.values, EMITTED: True}
    exec(compile(source, filename, "exec"), namespace)  # our own source, from our own graph
    function: Callable[..., Any] = namespace[name]
    function.__dict__["source"] = source
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function


def emit_region(region: Region, name: str) -> Callable[..., Any]:
    """A function of a region's inputs, which has the region's key."""
    function = emit(region.graph, name, method=False)
    function.__dict__["key"] = region.key
    return function


class _Writer:
    """Collects the globals that the source refers to, by readable names."""

    def __init__(self, locals: set[str]) -> None:
        self.locals = locals
        self.values: dict[str, Any] = {}
        self.names: dict[int, str] = {}

    def function(self, graph: fx.Graph, name: str, method: bool) -> str:
        inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
        last_use = _last_uses(graph)
        lines = [f"def {name}({', '.join((['self'] if method else []) + inputs)}):"]
        for node in graph.nodes:
            line = self.statement(node)
            if line:
                lines.append(f"    {line}{_release(last_use.get(node, []))}")
        return "\n".join(lines) + "\n"

    def statement(self, node: fx.Node) -> str | None:
        if node.op == "placeholder":
            return None
        if node.op == "output":
            return f"return {self.value(node.args[0])}"
        if node.op == "get_attr":
            return f"{node.name} = self.{_attribute(str(node.target))}"
        return f"{node.name} = {self.call(node)}"

    def call(self, node: fx.Node) -> str:
        args = [self.value(a) for a in node.args]
        if node.target in _INFIX:
            return f"({args[0]} {_INFIX[node.target]} {args[1]})"
        if node.target is operator.not_:
            return f"(not {args[0]})"
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        keywords = [f"{key}={self.value(value)}" for key, value in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:] + keywords)})"
        target = (
            f"self.{_attribute(str(node.target))}"
            if node.op == "call_module"
            else self.name(node.target)
        )
        return f"{target}({', '.join(args + keywords)})"

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if value is OWNER:
            return "self"
        if isinstance(value, Region):
            return self.region(value)
        if type(value) is list or type(value).__name__ == "immutable_list":
            return f"[{', '.join(map(self.value, value))}]"
        if type(value) is tuple:
            return f"({', '.join(map(self.value, value))}{',' if len(value) == 1 else ''})"
        if type(value) is dict or type(value).__name__ == "immutable_dict":
            return f"{{{', '.join(f'{k!r}: {self.value(v)}' for k, v in value.items())}}}"
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return f'float("{value}")'
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        if isinstance(value, slice):
            return f"slice({self.value(value.start)}, {self.value(value.stop)})"
        return self.name(value)

    def region(self, region: Region) -> str:
        name = f"activation_{len(self.values)}"
        self.values[name] = emit_region(region, name)
        return name

    def name(self, value: Any) -> str:
        """A global that holds the value."""
        if id(value) not in self.names:
            base = _readable(value)
            names = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1)))
            name = next(n for n in names if n not in self.values and n not in self.locals)
            self.values[name], self.names[id(value)] = value, name
        return self.names[id(value)]


def _readable(value: Any) -> str:
    if isinstance(value, torch._ops.OpOverload):
        return str(value).replace(".", "_").replace("::", "_")
    base = str(value) if isinstance(value, torch.dtype) else getattr(value, "__name__", "constant")
    name = "".join(c if c.isalnum() else "_" for c in base).lstrip("_")
    reserved = keyword.iskeyword(name) or hasattr(builtins, name) or not name
    return f"{name}_" if reserved else name


def _attribute(path: str) -> str:
    """`layers.0.weight` as an expression: numbered children of a container need `[0]`."""
    first, *rest = path.split(".")
    return first + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[str]]:
    """Which values each statement is the last to use; they are let go after it."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[str]] = {}
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder"):
            seen.update(node.all_input_nodes)
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen and n.op != "placeholder"]
        seen.update(node.all_input_nodes)
        result[node] = [n.name for n in fresh]
    return result


def _release(names: list[str]) -> str:
    return f"; del {', '.join(dict.fromkeys(names))}" if names else ""

"""Compute the products of layers from eight-bit numbers. Not exact."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from moe_compile import ops
from moe_compile.capture.boundary import enter, exit
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.ops.fp8 import RECIPES, Recipe
from moe_compile.passes.facts import EXPERTS_PLACED, LOWERED, NORMALIZED, PLANNED
from moe_compile.providers.provider import Call
from moe_compile.providers.registry import refusals_of
from moe_compile.rewrite.anchors import is_selection
from moe_compile.rewrite.chosen_experts import PRODUCTS
from moe_compile.rewrite.normal_form import aten
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.rewrite.writing import Writer

_ROUTING = ("ids", "weights")


@dataclass(frozen=True)
class QuantizeToFP8(Pass):
    """In: placed experts. Out: they, the linears and the gated MLPs of layers compute in FP8.

    Parameters stay as they are: they are quantised in every step. The router's products keep their
    dtype, and so does what is beside the layers, as the head, and whatever no provider takes; the
    unit notes why.

    Attributes:
        recipe: how numbers are scaled: see `ops.fp8_linear` and `ops.experts`.

    Raises:
        ValueError: for another recipe; when it runs, for a GPU without FP8.
    """

    name = "quantize_to_fp8"
    needs = frozenset({NORMALIZED, EXPERTS_PLACED})
    breaks = frozenset({PLANNED, LOWERED})
    exact = False
    tolerance = 0.25

    recipe: Recipe = "current"

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(
                f"QuantizeToFP8 got recipe={self.recipe!r}; it takes 'current', a scale for each "
                "tensor, or 'blockwise', one for 128 numbers; leave it out for 'current'"
            )

    def run(self, unit: UnitGraph) -> int:
        """Returns how many ops compute in FP8."""
        if not unit.name.rpartition(".")[2].isdigit():
            return 0  # what is beside the layers, as the head
        routing, noted, changed = _routing(unit.graph), set(unit.not_quantized), 0
        for node in list(unit.graph.nodes):
            if node.target not in _KINDS or unit.innermost(node) in noted:
                continue
            _check_device(node.meta["val"].device)
            try:
                if node in routing:
                    raise Refuse("it routes tokens")
                _KINDS[node.target](node, self.recipe, unit.mode.autocast)
                changed += 1
            except Refuse as refusal:
                unit.not_quantized[unit.innermost(node)] = refusal.reason
        return changed


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"QuantizeToFP8 got {torch.cuda.get_device_name(device)}, of compute capability "
            f"{capability[0]}.{capability[1]}; it takes 8.9 or newer, or a CPU, where FP8 is "
            "emulated; leave the pass out"
        )


def _routing(graph: fx.Graph) -> set[fx.Node]:
    """What is computed for nothing but a selection, and the last product on the way to one.

    That has other users where a layer computes a loss of its router's scores.
    """
    alone, last = set[fx.Node](), set[fx.Node]()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if user.target not in (enter, exit)]
        if users and all(user in alone or _routes(user, node) for user in users):
            alone.add(node)
        if any(_routes(user, node) or (user in last and not _is_product(user)) for user in users):
            last.add(node)
    return alone | last


def _is_product(node: fx.Node) -> bool:
    return node.target in PRODUCTS or isinstance(node.target, CanonicalOp)


def _routes(user: fx.Node, node: fx.Node) -> bool:
    if is_selection(user):
        return True
    if user.target not in (ops.experts, ops.dispatch, ops.start_dispatch):
        return False
    arguments = user.target.arguments(*user.args, **user.kwargs)  # type: ignore[union-attr]
    return node in [arguments[name] for name in _ROUTING] and arguments["x"] is not node


def _check(op: CanonicalOp[..., Any], arguments: dict[str, Any], autocast: Any) -> None:
    """Refuses a call that no provider takes."""
    values = fx.map_arg(arguments, lambda node: node.meta["val"])
    reasons = refusals_of(op, Call((), values, autocast))
    if reasons is not None:
        raise Refuse("; ".join(reasons))


def _quantize_experts(node: fx.Node, recipe: Recipe, autocast: Any) -> None:
    arguments = ops.experts.arguments(*node.args, **node.kwargs) | {"recipe": recipe}
    _check(ops.experts, arguments, autocast)
    node.kwargs = node.kwargs | {"recipe": recipe}
    _sign(node, recipe)


def _quantize_linear(node: fx.Node, recipe: Recipe, autocast: Any) -> None:
    if not _is_parameter(node.args[1]):
        raise Refuse("its weight is computed")
    given = dict(zip(("x", "weight", "bias"), node.args, strict=False)) | {"recipe": recipe}
    _check(ops.fp8_linear, given, autocast)
    node.target, node.args, node.kwargs = ops.fp8_linear, tuple(node.args), {"recipe": recipe}
    node.meta |= {"kind": "linear", "made_by": (QuantizeToFP8.name, "linear")}
    _sign(node, recipe)


def _quantize_mlp(node: fx.Node, recipe: Recipe, autocast: Any) -> None:
    """The three products as linears of their own: all of them, or none."""
    arguments: dict[str, Any] = ops.gated_mlp.arguments(*node.args, **node.kwargs)
    with node.graph.inserting_before(node):
        mlp = _MLP(Writer.beside(node, QuantizeToFP8.name), recipe, autocast)
        mlp.check(arguments)
        gate, up = (mlp.linear(arguments["x"], n, arguments) for n in ("gate", "up"))
        hidden = mlp.multiply(mlp.activate(arguments["activation"], gate), up)
        result = mlp.linear(hidden, "down", arguments)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


@dataclass(frozen=True)
class _MLP:
    """Writes the parts of a gated MLP."""

    writer: Writer
    recipe: Recipe
    autocast: torch.dtype | None

    def check(self, arguments: dict[str, Any]) -> None:
        x: Tensor = arguments["x"].meta["val"]
        for name in ("gate", "up", "down"):
            weight = arguments[name]
            given = x.new_empty(*x.shape[:-1], weight.meta["val"].shape[1])
            call = {"x": given, "weight": weight.meta["val"], "recipe": self.recipe}
            _check(ops.fp8_linear, call, self.autocast)

    def linear(self, x: fx.Node, name: str, arguments: dict[str, Any]) -> fx.Node:
        weight, value = arguments[name], x.meta["val"]
        out = value.new_empty(*value.shape[:-1], weight.meta["val"].shape[0])
        given = (x, weight, arguments[f"{name}_bias"])
        node = self.writer.add(ops.fp8_linear, given, out, {"recipe": self.recipe})
        _sign(node, self.recipe)
        return node

    def activate(self, activation: Any, x: fx.Node) -> fx.Node:
        """The region's own nodes."""
        known = dict[fx.Node, fx.Node]()
        for node in activation.graph.nodes:
            if node.op == "placeholder":
                known[node] = x
            elif node.op == "output":
                return known[node.args[0]]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = self._add(node.target, args, kwargs)
        raise AssertionError("a region returns a value")

    def multiply(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._add(aten.mul.Tensor, (a, b), {})

    def _add(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        fakes, options = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
        with detect_fake_mode([a for a in fakes if isinstance(a, Tensor)]):  # type: ignore[union-attr]
            return self.writer.add(target, args, target(*fakes, **options), kwargs)


def _is_parameter(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target is aten.to.dtype:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _sign(node: fx.Node, recipe: Recipe) -> None:
    node.meta |= {"numerics": f"fp8 {recipe}", "tolerance": QuantizeToFP8.tolerance}


_KINDS: dict[Any, Any] = {
    aten.linear.default: _quantize_linear,
    ops.experts: _quantize_experts,
    ops.gated_mlp: _quantize_mlp,
}

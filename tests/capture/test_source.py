import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from moe_compile.capture.group import group
from moe_compile.capture.probe import probe
from moe_compile.capture.shadow import cast_shadow
from moe_compile.capture.source import recorded_lines
from moe_compile.rewrite.normal_form import normalize
from tests.families import build


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * 2.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.scale(y)


def captured(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> Iterator[fx.Graph]:
    shadow = cast_shadow(model)
    for found in group(shadow, probe(shadow, inputs).calls):
        assert found.capture is not None
        yield found.capture.graph


def line(module: type[nn.Module], code: str) -> str:
    lines, first = inspect.getsourcelines(module)
    number = first + next(i for i, text in enumerate(lines) if text.strip() == code)
    return f"test_source.py:{number}, in forward: {code}"


def test_a_node_knows_its_line() -> None:
    (graph,) = captured(nn.Sequential(Block()), (torch.randn(2, 5, 8),))
    sources = {node.name: node.meta["source"] for node in graph.nodes}
    assert sources["linear"] == line(Block, "y = self.linear(x)")
    assert sources["silu"] == line(Scale, "return torch.nn.functional.silu(x) * 2.0")


def test_lines_survive_the_normal_form() -> None:
    for graph in captured(build("mixtral")):
        normalize(graph)
        inside = [n for n in graph.nodes if n.op == "call_function" and len(n.meta["calls"]) > 1]
        assert all(node.meta["source"] for node in inside)


def test_callers_of_the_traced_function_are_not_named() -> None:
    graph = fx.Graph()

    def run() -> fx.Node:
        with recorded_lines():
            return graph.placeholder("x")

    assert run().meta["source"] is None
    assert "source" not in graph.placeholder("y").meta

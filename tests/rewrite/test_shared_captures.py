import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_compile.capture.group import group
from moe_compile.capture.probe import probe
from moe_compile.capture.shadow import cast_shadow
from moe_compile.optimize import run_passes
from moe_compile.passes import PIPELINE
from moe_compile.rewrite.owners import Owners
from moe_compile.rewrite.unit_graph import UnitGraph


class Norm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, inner: nn.Module, eps: float = 1e-6) -> None:
        super().__init__()
        self.first, self.inner, self.last = Norm(), inner, Norm(eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def captured(*layers: Layer) -> list[list[tuple[str, UnitGraph]]]:
    """The owners in other call forms, of each group of layers."""
    shadow = cast_shadow(Model(*layers))
    owners = Owners(shadow)
    found: list[list[tuple[str, UnitGraph]]] = []
    for alike in group(shadow, probe(shadow, (torch.zeros(2, 5, 8),)).calls):
        assert alike.capture is not None
        first = UnitGraph.of(alike.names[0], alike.capture, {})
        run_passes(PIPELINE, first)
        found.append(owners.capture(alike, first))
    return found


def graphs(found: list[list[tuple[str, UnitGraph]]]) -> set[int]:
    return {id(unit.graph) for part in found for _, unit in part}


def test_owners_that_are_alike_share_a_capture_across_groups() -> None:
    found = captured(Layer(nn.Sigmoid()), Layer(nn.Tanh()))
    assert [[path for path, _ in part] for part in found] == [["first", "last"]] * 2
    assert len(graphs(found)) == 1


def test_owners_that_differ_in_what_their_code_reads_do_not() -> None:
    assert len(graphs(captured(Layer(nn.Tanh()), Layer(nn.Tanh(), eps=1e-3)))) == 2


def test_a_shared_capture_is_known_under_the_names_of_each() -> None:
    (_, unit), *_ = captured(Layer(nn.Tanh()))[0]
    run_passes(PIPELINE, unit)
    other = unit.at("layers.7", "last")
    assert list(other.owners()) == ["last"]
    assert other.graph is unit.graph
    assert list(unit.owners()) == ["first"]


def test_a_size_lies_in_the_call_of_its_tensor() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x).reshape(x.shape[0] * x.shape[1], 8).reshape(x.shape)

    shadow = cast_shadow(Model(Layer(Flat())))
    (alike,) = group(shadow, probe(shadow, (torch.zeros(2, 5, 8),)).calls)
    assert alike.capture is not None
    sizes = [n for n in alike.capture.graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert sizes
    assert all(size.meta["calls"] == size.args[0].meta["calls"] for size in sizes)

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import Region, capture, check_row_wise, cut
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.harness import BATCH, Function, calls, normal, unit_of
from tests.patterns.idioms import swiglu

ROWS = normal(BATCH, 8)


def between_sines(function: Function) -> UnitGraph:
    """A unit in which the function stands between a sine and a cosine."""
    return unit_of(lambda x: function(x.sin()).cos(), ROWS)


def ends(unit: UnitGraph) -> tuple[fx.Node, fx.Node]:
    """The sine, and what goes into the cosine."""
    nodes = {str(node.target): node for node in calls(unit.graph)}
    return nodes["aten.sin.default"], nodes["aten.cos.default"].all_input_nodes[0]


def region_of(function: Function) -> Region:
    source, result = ends(between_sines(function))
    nodes = cut(source, result)
    assert nodes is not None
    return capture(source, result, nodes)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def interleaved(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def joined(x: Tensor) -> Tensor:
    return torch.cat((x, F.gelu(x)), dim=-1)


def picked(x: Tensor) -> Tensor:
    pairs = x.unsqueeze(-1) * 2.0
    return pairs.select(-1, 0).double()


def where(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def normalized_by_torch(x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,))


ROW_WISE = [swiglu, relu_squared, interleaved, joined, picked, where, F.silu, torch.tanh]
NORMS = [normalized, normalized_by_torch]


@pytest.mark.parametrize("function", ROW_WISE + NORMS)
def test_a_region_is_the_function_that_it_was_captured_from(function: Function) -> None:
    region = region_of(function)
    assert torch.equal(region(ROWS), function(ROWS))
    assert [node.op for node in region.graph.nodes].count("placeholder") == 1


@pytest.mark.parametrize("function", ROW_WISE + NORMS)
def test_what_acts_on_each_row_alone_passes(function: Function) -> None:
    region = region_of(function)
    check_row_wise(region)
    assert torch.equal(region(ROWS)[1:], function(ROWS[1:]))


def over_rows(x: Tensor) -> Tensor:
    return x.softmax(0)


def sorted_rows(x: Tensor) -> Tensor:
    return x.sort(0).values


def first_row(x: Tensor) -> Tensor:
    return x[:1] * x


def flipped(x: Tensor) -> Tensor:
    return x.flip(0)


def flattened(x: Tensor) -> Tensor:
    return x.reshape(-1, 4)


def accumulated(x: Tensor) -> Tensor:
    return x.cumsum(0)


def crossed(x: Tensor) -> Tensor:
    """[T] * [T, 1] is a product of every two tokens."""
    return x * (x[:, 0] * x[:, :1])[:, :1]


def paired(x: Tensor) -> Tensor:
    """[T, 1, 1] * [T, H] is [T, T, H]: a product of every two tokens, which are then added up."""
    return (x[:, :1].unsqueeze(-1) * x).sum(1)


def mean_of_all(x: Tensor) -> Tensor:
    return x * x.mean((0, 1), keepdim=True)


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


MIXING = {
    mean_of_all: "aten.mean.dim in the activation may mix tokens",
    dropped: "aten.dropout.default in the activation draws random numbers",
    over_rows: "aten.softmax.int in the activation may mix tokens",
    first_row: "aten.slice.Tensor in the activation may mix tokens",
    flipped: "aten.flip.default in the activation may mix tokens",
    flattened: "aten.reshape.default in the activation may mix tokens",
    accumulated: "aten.cumsum.default in the activation may mix tokens",
    sorted_rows: ".* in the activation may mix tokens",
    crossed: ".* in the activation may mix tokens",
    paired: "aten.mul.Tensor in the activation may mix tokens",
}


@pytest.mark.parametrize("function", MIXING)
def test_refuses_what_is_not_row_by_row(function: Function) -> None:
    region = region_of(function)
    with pytest.raises(Refuse, match=f"^{MIXING[function]}$") as refused:
        check_row_wise(region)
    assert refused.value.node in set(region.graph.nodes)


def test_nothing_is_between_a_node_and_itself() -> None:
    source, _ = ends(between_sines(F.silu))
    assert cut(source, source) is None


def test_a_cut_fails_where_something_else_flows_in() -> None:
    unit = unit_of(lambda x, y: (x.sin() * y).cos(), ROWS, ROWS)
    assert cut(*ends(unit)) is None


def test_a_cut_fails_at_a_parameter() -> None:
    unit = unit_of(lambda x, weight: (x.sin() * weight).cos(), ROWS, weight=normal(8))
    assert cut(*ends(unit)) is None


def test_a_cut_holds_the_result_and_not_the_source() -> None:
    source, result = ends(between_sines(relu_squared))
    nodes = cut(source, result)
    assert nodes is not None
    assert result in nodes
    assert source not in nodes
    assert [str(node.target) for node in sorted(nodes)] == [
        "aten.relu.default",
        "aten.pow.Tensor_Scalar",
    ]


def test_a_region_prints_its_steps() -> None:
    assert "aten.relu.default(x,)" in repr(region_of(relu_squared))

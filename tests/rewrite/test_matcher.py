import pytest
import torch
from torch import Tensor, nn

from moe_compile.capture.boundary import enter, exit
from moe_compile.capture.trace import Mode
from moe_compile.passes import Normalize, RaiseMLPs, RaiseNorms
from moe_compile.patterns import GatedMLP, RMSNorm
from moe_compile.rewrite.matcher import NearMiss, find
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Idiom,
    assert_raised,
    calls,
    canonical_node,
    capture,
    normal,
    op_names,
    unit_of,
)
from tests.patterns.idioms import EPS, gated_mlp, norm_unit, rms_norm

X = normal(BATCH, SEQUENCE, 8)


class Scaled(Pattern):
    """A named literal between two that are compared."""

    name = "scaled"
    kind = "test"
    shapes = {"x": (4, 8)}

    @staticmethod
    def before(x: Tensor, factor: float) -> Tensor:
        return ((x + 1.5).sin() * factor).pow(3).softmax(-1)


class Terms(Pattern):
    """A sum and a difference, of which one may be turned round."""

    name = "terms"
    kind = "test"
    shapes = {"x": (4, 8)}

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return (x.sin() - (x.exp() + x.cos())).softmax(-1)


class Folded(Pattern):
    """A reshape whose sizes count."""

    name = "folded"
    kind = "test"
    shapes = {"x": (4, 8)}

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, x.shape[-1] // 2)).softmax(-1).sin()


def matches(pattern: Pattern, unit: UnitGraph) -> tuple[list[Match], NearMiss]:
    miss = NearMiss(pattern.name)
    return list(find(pattern, unit.graph, miss, unit.mode)), miss


def scaled(offset: float = 1.5, factor: float = 2.5, power: int = 3, dim: int = -1) -> UnitGraph:
    return unit_of(lambda x: ((x + offset).sin() * factor).pow(power).softmax(dim), X)


@pytest.mark.parametrize("factor", [2.5, -1.0, 7])
def test_a_named_literal_may_be_any_number(factor: float) -> None:
    (match,), _ = matches(Scaled(), scaled(factor=factor))
    assert match.bindings["factor"] == match.value("factor") == factor


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        (scaled(offset=1.25), "expected the literal 1.5, found 1.25"),
        (scaled(power=2), "expected exponent=3, found 2"),
        (scaled(dim=1), "expected dim=2, found 1"),
    ],
)
def test_other_literals_are_compared(unit: UnitGraph, reason: str) -> None:
    found, miss = matches(Scaled(), unit)
    assert not found
    assert miss.reason == reason


def test_the_terms_of_a_sum_change_places_and_those_of_a_difference_do_not() -> None:
    summed = unit_of(lambda x: (x.sin() - (x.cos() + x.exp())).softmax(-1), X)
    assert len(matches(Terms(), summed)[0]) == 1
    swapped = unit_of(lambda x: ((x.exp() + x.cos()) - x.sin()).softmax(-1), X)
    assert matches(Terms(), swapped)[0] == []


def test_a_reshape_has_the_idiom_s_own_sizes() -> None:
    same = unit_of(lambda x: x.unflatten(-1, (2, 4)).softmax(-1).sin(), X)
    assert len(matches(Folded(), same)[0]) == 1
    other = unit_of(lambda x: x.unflatten(-1, (4, 2)).softmax(-1).sin(), X)
    assert matches(Folded(), other)[0] == []


def test_a_match_says_what_it_found() -> None:
    unit = norm_unit()
    match = matches(RMSNorm(), unit)[0][0]
    ends = [n for n in unit.graph.nodes if n.target is exit]
    assert ends[0].args == (0, match.root)
    assert match.nodes == set(calls(unit.graph))
    assert match.bindings["eps"] == EPS
    assert match.bindings["weight"].target == "weight"
    assert match.value("x").shape[-1] == 8
    assert match.choice == {"cast_first": True, "one_plus": False}


def test_a_near_miss_keeps_the_node_the_count_and_the_reason() -> None:
    _, miss = matches(Scaled(), scaled(power=2))
    assert (miss.pattern, miss.node) == ("scaled", "pow_1")
    assert miss.matched == miss.total == 5
    assert miss.calls == (0,)


def test_the_best_near_miss_is_kept() -> None:
    miss = NearMiss("pattern")
    miss.offer(2, 5, None, "two")
    miss.offer(1, 5, None, "one")
    assert (miss.matched, miss.reason) == (2, "two")
    miss.offer(4, 5, None, "four")
    assert (miss.matched, miss.total, miss.reason) == (4, 5, "four")


def test_a_pass_that_matched_everything_keeps_no_near_miss() -> None:
    unit = norm_unit()
    assert RaiseNorms().run(unit) == 1
    assert unit.near_misses["rms_norm"].node == ""
    assert unit.near_misses["rms_norm"].reason == ""


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_any_rank_and_dtype(rank: int, dtype: torch.dtype) -> None:
    x = normal(*(BATCH, SEQUENCE, 2, 8)[-rank:], dtype=dtype)
    unit = unit_of(rms_norm, x, weight=normal(8, dtype=dtype))
    assert_raised(RaiseNorms(), unit, ["rms_norm"])


def test_matches_under_autocast() -> None:
    weights = {"gate": normal(6, 8), "up": normal(6, 8), "down": normal(8, 6)}
    unit = capture(Idiom(gated_mlp, weights), X, mode=Mode(autocast=torch.bfloat16))
    Normalize().run(unit)
    assert RaiseMLPs().run(unit) == 1
    assert canonical_node(unit).meta["val"].dtype == torch.bfloat16


def test_finds_every_occurrence_last_first() -> None:
    def twice(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(rms_norm(x, weight), weight)

    unit = unit_of(twice, X, weight=normal(8))
    found, _ = matches(RMSNorm(), unit)
    order = {node: i for i, node in enumerate(unit.graph.nodes)}
    assert [order[m.root] for m in found] == sorted((order[m.root] for m in found), reverse=True)
    assert_raised(RaiseNorms(), unit, ["rms_norm", "rms_norm"])


def test_nothing_changes_while_matching() -> None:
    unit = norm_unit()
    before = str(unit.graph)
    assert matches(RMSNorm(), unit)[0]
    assert not matches(GatedMLP(), unit)[0]
    assert str(unit.graph) == before


class Norm(nn.Module):
    """A norm that also returns what it divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * (x * root), root


class Layer(nn.Module):
    """Calls the norm and may use the second result."""

    def __init__(self, uses_root: bool) -> None:
        super().__init__()
        self.norm = Norm()
        self.uses_root = uses_root

    def forward(self, x: Tensor) -> Tensor:
        out, root = self.norm(x)
        return out + root if self.uses_root else out.sin()


def layer(*, uses_root: bool) -> UnitGraph:
    unit = capture(Layer(uses_root), X)
    Normalize().run(unit)
    return unit


def test_an_inner_value_may_be_an_output_that_nothing_uses() -> None:
    unit = layer(uses_root=False)
    assert_raised(RaiseNorms(), unit, ["rms_norm", "sin"])
    assert unit.owner(canonical_node(unit)) == "norm"


def test_an_inner_value_that_another_module_uses_escapes() -> None:
    found, miss = matches(RMSNorm(), layer(uses_root=True))
    assert not found
    assert miss.reason.startswith("the inner value rsqrt is used by add")


class Outer(nn.Module):
    """A norm whose root is computed by a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(8))
        self.root = Idiom(lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), {})

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * self.root(x))


def test_a_match_may_reach_into_a_child_whose_call_then_goes() -> None:
    unit = capture(Outer(), X)
    Normalize().run(unit)
    entered = [n.args[0] for n in unit.graph.nodes if n.target is enter]
    assert entered == [0, 1]
    assert RaiseNorms().run(unit) == 1
    node = canonical_node(unit)
    assert node.meta["crosses"] == {1}
    assert node.meta["calls"] == (0,)
    assert [n.args[0] for n in unit.graph.nodes if n.target is enter] == [0]
    assert op_names(unit) == ["rms_norm"]


class Passing(nn.Module):
    """A norm whose inner value goes through another module."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(8))
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * (x * self.child(root))


def test_a_child_that_only_passes_an_inner_value_on_goes_too() -> None:
    unit = capture(Passing(nn.Sequential(nn.Dropout(0.0), nn.Identity())), X)
    Normalize().run(unit)
    assert RaiseNorms().run(unit) == 1
    assert canonical_node(unit).meta["crosses"] == {1, 2, 3}
    assert [n.args[0] for n in unit.graph.nodes if n.target is enter] == [0]

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compile.passes import Normalize
from moe_compile.passes.facts import NORMALIZED
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    Idiom,
    capture,
    evaluate,
    normal,
    op_names,
    unit_of,
)

X = normal(BATCH, SEQUENCE, 8)
aten = torch.ops.aten


def overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :2].mul_(2.0)
    return y.add_(x).clamp_(min=0.0)


def filled(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float64).copy_(x)


def projected_view_as(x: Tensor) -> Tensor:
    return x.flatten(0, 1).cumsum(-1).view_as(x)


def projected_unflatten(x: Tensor) -> Tensor:
    return x.flatten(0, 1).cumsum(-1).unflatten(0, x.shape[:2])


SPELLINGS: dict[str, tuple[Function, list[str]]] = {
    "view": (lambda x: x.view(x.shape[0], -1), ["reshape"]),
    "reshape": (lambda x: x.reshape(-1, 2, 4), ["reshape"]),
    "flatten": (lambda x: x.flatten(1), ["reshape"]),
    "unflatten": (lambda x: x.unflatten(-1, (2, 4)), ["reshape"]),
    "view back": (lambda x: x.view(-1, 8).view(x.shape), []),
    "projected view_as": (projected_view_as, ["reshape", "cumsum", "reshape"]),
    "projected unflatten": (projected_unflatten, ["reshape", "cumsum", "reshape"]),
    "chunk": (lambda x: x.chunk(2, -1)[1], ["slice"]),
    "split": (lambda x: x.split([3, 5], dim=2)[0], ["slice"]),
    "slice": (lambda x: x[..., -5:], ["slice"]),
    "slice of all": (lambda x: x[:, :, :8], []),
    "slice with a step": (lambda x: x[..., 1::2], ["slice"]),
    "transpose": (lambda x: x.transpose(-1, -2), ["transpose"]),
    "permute": (lambda x: x.permute(0, 2, 1), ["transpose"]),
    "mT": (lambda x: x.mT, ["transpose"]),
    "swapaxes": (lambda x: x.swapaxes(2, 1), ["transpose"]),
    "movedim": (lambda x: x.movedim(0, -1), ["permute"]),
    "permute of none": (lambda x: x.permute(0, 1, -1), []),
    "to": (lambda x: x.to(torch.float64), ["to"]),
    "type_as": (lambda x: x.type_as(x.double()), ["to"]),
    "double": (lambda x: x.double(), ["to"]),
    "float": (lambda x: x.float(), []),
    "square": (lambda x: x.square(), ["pow"]),
    "pow": (lambda x: x**2, ["pow"]),
    "reversed sub": (lambda x: torch.rsub(x, x.sin()), ["sin", "sub"]),
    "one minus": (lambda x: 1 - x, ["rsub"]),
    "sub with a factor": (lambda x: torch.sub(x, x.sin(), alpha=3), ["sin", "sub"]),
    "add.Scalar": (lambda x: aten.add.Scalar(x, 2.5), ["add"]),
    "add.Scalar with a factor": (lambda x: aten.add.Scalar(x, 2, 3), ["add"]),
    "sub.Scalar with a factor": (lambda x: aten.sub.Scalar(x, 2, 3), ["sub"]),
    "floor division": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), ["floor_divide"]),
    "truncated division": (lambda x: torch.div(x, 0.3, rounding_mode="trunc"), ["div"]),
    "clip": (lambda x: x.clip(-0.5, 0.5), ["clamp"]),
    "contiguous": (lambda x: x.contiguous() + 1, ["add"]),
    "dropout that is off": (lambda x: F.dropout(x, 0.5, training=False) + 1, ["add"]),
    "in place": (overwritten, ["clone", "slice", "mul", "slice_scatter", "add", "clamp"]),
    "copy": (filled, ["to", "clone"]),
    "tile": (lambda x: x.tile(1, 1, 3), ["tile"]),
    "roll": (lambda x: x.roll(1, dims=-1), ["roll"]),
    "flip": (lambda x: x.flip(-1), ["flip"]),
    "stack": (lambda x: torch.stack((x, x), dim=-1), ["stack"]),
    "unsqueeze": (lambda x: x.unsqueeze(-1), ["unsqueeze"]),
    "diagonal": (lambda x: x.diagonal(dim1=-2, dim2=-1), ["diagonal"]),
    "diag_embed": (lambda x: x.diag_embed(), ["diag_embed"]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=-2), ["repeat_interleave"]),
}


def captured(function: Function) -> UnitGraph:
    return capture(Idiom(function, {}), X)


def assert_same_values(unit: UnitGraph, inputs: list[Tensor]) -> None:
    """Normalizing changes no bit, dtype or shape of what the graph computes."""
    want = evaluate(unit.graph, inputs, {})
    Normalize().run(unit)
    got = evaluate(unit.graph, inputs, {})
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", SPELLINGS)
def test_gives_one_spelling_and_the_same_values(name: str) -> None:
    function, names = SPELLINGS[name]
    unit = captured(function)
    assert_same_values(unit, [X])
    assert torch.equal(evaluate(unit.graph, [X], {})[0], function(X))
    assert op_names(unit) == names
    assert NORMALIZED.holds(unit.graph)
    assert Normalize().run(unit) == 0


def test_gives_its_fact() -> None:
    unit = captured(lambda x: x.square())
    assert not NORMALIZED.holds(unit.graph)
    assert Normalize().run(unit) == 1
    assert NORMALIZED.holds(unit.graph)
    assert Normalize.gives == {NORMALIZED}
    assert not Normalize.needs | Normalize.breaks


def test_keeps_the_normal_form_of_the_capture() -> None:
    unit = unit_of(lambda x: x.square(), X)
    assert str(unit.captured) == str(unit.graph)
    assert unit.captured is not unit.graph


def test_drops_what_nothing_uses_and_keeps_random_draws() -> None:
    def function(x: Tensor) -> Tensor:
        _ = x.sin()
        torch.rand_like(x)
        return x + 1

    assert op_names(unit_of(function, X)) == ["rand_like", "add"]


def test_dropout_that_is_on_stays() -> None:
    assert op_names(unit_of(lambda x: F.dropout(x, 0.5), X)) == ["dropout"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.transpose(0, 1).contiguous().view(x.shape[1], x.shape[0], 2, 4),
        lambda x: x.transpose(0, 1).flatten(0, 1).view(x.shape[1], x.shape[0], 8),
    ],
    ids=["copied", "copied and viewed", "flattened and viewed"],
)
def test_what_was_returned_contiguous_stays_so(function: Function) -> None:
    assert function(X).is_contiguous()
    (out,) = evaluate(unit_of(function, X).graph, [X], {})
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(),
        lambda x: x.clone().view(-1, 8),
        lambda x: torch.empty_like(x).copy_(x),
    ],
    ids=["cloned", "cloned and viewed", "copied into"],
)
def test_what_was_returned_apart_from_the_input_stays_so(function: Function) -> None:
    (out,) = evaluate(unit_of(function, X).graph, [X], {})
    assert out.data_ptr() != X.data_ptr()


LINKS: dict[str, Function] = {
    "view": lambda x: x.view(x.shape),
    "flat": lambda x: x.reshape(-1, 8).reshape(x.shape),
    "halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "parts": lambda x: torch.cat(x.split([3, 5], -1), dim=2),
    "ends": lambda x: torch.cat((x[..., -3:], x[..., :-3]), -1),
    "transposed": lambda x: x.transpose(0, -1).sin().permute(2, 1, 0),
    "mT": lambda x: (x.mT * 2).swapaxes(1, 2),
    "double": lambda x: x.double().square().type_as(x),
    "in place": lambda x: x.clone().mul_(0.5).sub_(x.sin()),
    "minus": lambda x: 1 - x,
    "rsub": lambda x: torch.rsub(x, x.cos()),
    "contiguous": lambda x: x.mT.contiguous().mT,
    # Of ones and zeros: in other strides, which a copy may have had, sums have another order.
    "mean": lambda x: x - (x > 0).type_as(x).mean(-1, keepdim=True),
    "stack": lambda x: torch.stack((x, x.cos()), -1).amax(-1),
    "unsqueeze": lambda x: x.unsqueeze(-2).expand(-1, -1, 2, -1).sum(-2),
    "clip": lambda x: x.clip(max=0.75),
    "floor": lambda x: torch.div(x, 0.25, rounding_mode="floor"),
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(LINKS)), min_size=1, max_size=6))
def test_chains_keep_their_values(names: list[str]) -> None:
    def chain(x: Tensor) -> Tensor:
        y: Any = x
        for name in names:
            y = LINKS[name](y.contiguous() if name == "view" else y)
        return y

    unit = captured(chain)
    assert_same_values(unit, [X])
    assert NORMALIZED.holds(unit.graph)

"""The grammar: deterministic, fully reachable, and what it writes runs."""

import dataclasses
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from moe_compile.fuzz.draw import draw, select
from moe_compile.fuzz.judge import difference, measure
from moe_compile.fuzz.load import load
from moe_compile.fuzz.source import source
from moe_compile.fuzz.spec import BlockSpec, LookAlike, Loop, unsupported

DRAWN = [draw(seed) for seed in range(3000)]
CHOICES = {
    name: set(get_args(hint))
    for name, hint in get_type_hints(BlockSpec).items()
    if get_origin(hint) is Literal
}
FLAGS = [name for name, hint in get_type_hints(BlockSpec).items() if hint is bool]


def run(spec: BlockSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return measure(load(spec), torch.randn(2, 6, spec.hidden, generator=generator))


def test_a_seed_is_a_block() -> None:
    assert draw(7) == draw(7)
    assert source(draw(7)) == source(draw(7))
    states = [load(draw(7)).state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))


def test_seeds_differ() -> None:
    assert len({source(spec) for spec in DRAWN}) > 0.99 * len(DRAWN)


def test_blocks_are_selected_by_their_choices() -> None:
    assert select(5, 3, {}) == [5, 6, 7]
    seeds = select(0, 4, {"loop": "hit", "storage": "module_list", "residual": "True"})
    found = [draw(seed) for seed in seeds]
    assert {(s.loop, s.storage, s.residual) for s in found} == {("hit", "module_list", True)}
    with pytest.raises(ValueError, match="--only got 'colour'; it takes seed, experts"):
        select(0, 1, {"colour": "red"})
    with pytest.raises(ValueError, match="loop=gather_bmm, storage=module_list; 0 blocks of"):
        select(0, 1, {"loop": "gather_bmm", "storage": "module_list"})


@pytest.mark.parametrize("name", CHOICES)
def test_every_production_is_reached(name: str) -> None:
    assert {getattr(spec, name) for spec in DRAWN} == CHOICES[name]


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_reached(name: str) -> None:
    assert {getattr(spec, name) for spec in DRAWN} == {True, False}


def test_most_blocks_are_supported() -> None:
    look_alikes = [spec for spec in DRAWN if spec.look_alike != "none"]
    assert 0.06 < len(look_alikes) / len(DRAWN) < 0.10
    assert all(unsupported(spec) for spec in look_alikes)
    assert sum(unsupported(spec) is None for spec in DRAWN) > 0.88 * len(DRAWN)


@pytest.mark.parametrize("loop", get_args(Loop))
def test_storages_of_a_loop(loop: str) -> None:
    """Loops that call single experts meet lists of modules, and every loop meets stacks."""
    storages = {spec.storage for spec in DRAWN if spec.loop == loop}
    assert {"stacked", "stacked_transposed", "separate", "interleaved", "flat"} <= storages


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_it_runs_forward_and_backward(first: int) -> None:
    for spec in DRAWN[first : first + 50]:
        values = run(spec)
        assert values["output 0"].shape == (2, 6, spec.hidden)
        assert ("output 3" in values) == spec.logits_out
        assert all(value.isfinite().all() for value in values.values()), spec


def test_the_source_is_at_hand() -> None:
    spec = DRAWN[0]
    block = type(load(spec).layers[0])
    assert inspect.getsource(block) in source(spec)


def test_every_parameter_gets_a_gradient() -> None:
    """In a block with softmax weights, in every loop, on many tokens."""
    for loop in get_args(Loop):
        spec = BlockSpec(seed=1, experts=4, top_k=2, hidden=8, width=8, loop=loop)
        values = measure(load(spec), torch.randn(4, 20, 8))
        assert all(value.norm() > 0 for value in values.values()), loop


@pytest.mark.parametrize("combine", ["inverse", "scattered", "argsort", "index_add"])
def test_loops_compute_the_same(combine: Any) -> None:
    """Every loop is another spelling of one block."""
    spec = BlockSpec(seed=3, experts=6, top_k=3, hidden=8, width=16, loop="where", bias=True)
    expected = run(spec)
    for loop in set(get_args(Loop)) - {"dense_input"}:  # its biases would come from every expert
        spelled = dataclasses.replace(spec, loop=loop, combine=combine)
        actual = run(spelled)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=f"{name} of {loop}")


@pytest.mark.parametrize("look_alike", [a for a in get_args(LookAlike) if a != "none"])
def test_look_alikes_are_no_mixtures(look_alike: LookAlike) -> None:
    """Most of them compute something else than the plain loop over the same parameters."""
    drawn = [spec for spec in DRAWN if spec.look_alike == look_alike and spec.top_k > 1][:8]
    plain = [
        dataclasses.replace(spec, look_alike="none", loop="where", skip_empty=False)
        for spec in drawn
    ]
    pairs = [(run(spec), run(other)) for spec, other in zip(drawn, plain, strict=True)]
    differ = [difference(a, b) is not None for a, b in pairs]
    assert sum(differ) > len(differ) / 2

"""Activation checkpointing in one process: the same gradients, and nothing routed twice."""

import copy
import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.install.recompute import KEPT, policy
from moe_compile.kernels.top_k import top_k
from tests.counting import CountOps
from tests.families import build
from tests.pairs import COMPILED, check_close, inputs, make_pair, step

ROUTING = ("aten::topk", "moe_compile::group_picks")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("moe_compile::grouped_mm", "aten::mm", "aten::bmm", ATTENTION)
ASSERT = torch.ops.aten._assert_scalar.default
CHEAP = ("aten::rsqrt", "aten::silu")


def quick(mode: Any, compile: Any = False) -> OptimizeConfig:
    return OptimizeConfig(
        activation_checkpointing=mode, compile=compile, verify="off", autocast=False
    )


def optimized(model: Any, mode: Any, compile: Any) -> Any:
    return moe_compile.optimize(copy.deepcopy(model), config=quick(mode, compile))


def counted(model: Any, **options: Any) -> tuple[dict[str, Tensor], Counter[str]]:
    """A step, and what ran in it; the first one compiles."""
    step(model, **inputs(), **options)
    with CountOps() as ops:
        values = step(model, **inputs(), **options)
    return values, ops.calls


def same_bits(values: dict[str, Tensor], references: dict[str, Tensor]) -> None:
    assert values.keys() == references.keys()
    assert [n for n, v in values.items() if not torch.equal(v, references[n])] == []


@pytest.mark.parametrize(
    ("family", "compile"),
    [
        pytest.param("qwen3_moe", False, id="eager"),
        pytest.param("qwen3_moe", COMPILED.compile, id="compiled"),
        pytest.param("deepseek_v3", False, id="latent attention", marks=pytest.mark.matrix),
    ],
)
def test_gradients_are_the_same_bits_and_routing_runs_once(family: str, compile: Any) -> None:
    """The router of one changes its picks' weights in place."""
    model = build(family, num_hidden_layers=2)
    want, once = counted(optimized(model, "none", compile))
    for mode in ("full", "selective"):
        values, calls = counted(optimized(model, mode, compile))
        same_bits(values, want)
        assert all(calls[op] == once[op] > 0 for op in ROUTING)
        again = {op for op in PRODUCTS if calls[op] > once[op]}
        assert (once[ATTENTION] > 0) == (family == "qwen3_moe")  # the other has wide keys
        assert again >= {"moe_compile::grouped_mm", "aten::mm"} if mode == "full" else not again
        if compile is False:
            assert all(calls[op] >= once[op] + 2 for op in CHEAP)


@pytest.mark.parametrize("compile", [False, COMPILED.compile], ids=["eager", "compiled"])
def test_router_logits_are_recorded_once(compile: Any) -> None:
    model = build("mixtral")
    call = inputs() | {"output_router_logits": True}
    checkpointed = optimized(model, "selective", compile)
    want = step(copy.deepcopy(model), **call)
    check_close(step(checkpointed, **call), want)
    result = checkpointed(**call)
    assert len(result.router_logits) == 2
    result.loss.backward()
    assert len(result.router_logits) == 2


def test_hugging_faces_own_checkpointing_around_it() -> None:
    pair = make_pair(build("mixtral"), quick("selective"))
    pair.optimized.gradient_checkpointing_enable()
    check_close(step(pair.optimized, **inputs()), step(pair.original, **inputs()))


def test_a_cache_is_filled_once() -> None:
    pair = make_pair(build("mixtral"), quick("full"))
    call = inputs() | {"use_cache": True}
    check_close(step(pair.optimized, **call), step(pair.original, **call))


def test_evaluation_keeps_nothing() -> None:
    model = optimized(build("mixtral"), "selective", False).eval()
    with torch.no_grad(), CountOps() as ops:
        model(**inputs())
    assert ops.calls["aten::topk"] == 2


def test_every_operator_of_ours_that_is_kept_exists() -> None:
    for package in ("kernels.expert_rows", "providers.registry"):
        importlib.import_module(f"moe_compile.{package}")
    own = [name.split("::")[1] for name in KEPT["selective"] if name.startswith("moe_compile::")]
    assert len(own) == 8 + 3 * len(("dispatch", "combine")) * len(("", "start", "wait"))
    assert [name for name in own if not hasattr(torch.ops.moe_compile, name)] == []


def test_no_size_is_checked_again() -> None:
    """Torch 2.11 keeps what a check that runs again compares, and Inductor cannot pass that on."""
    for mode, kept in KEPT.items():
        checked = policy(kept, SelectiveCheckpointContext(is_recompute=False), ASSERT)
        assert checked == CheckpointPolicy.PREFER_SAVE, mode


class Layer(nn.Module):
    """What draws is computed again, from the same numbers; what is kept may change in place."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.out = nn.Linear(8, 6), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).exp().topk(2)
        weights /= weights.sum(-1, keepdim=True)
        drawn = torch.multinomial(weights.detach().flatten(0, 1), 1).view(ids[..., :1].shape)
        y = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        y = nn.functional.dropout(self.out(y), 0.5) * weights.gather(-1, drawn)
        return x + y.sin() * ids.sum(-1, keepdim=True)


class Picking(nn.Module):
    """What `RaiseTopK` makes of a router, on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        values, ids = top_k(self.router(x), 2)
        return x + (values * ids).sin().sum(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_random_numbers_and_changes_in_place() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 5, 8)
    found: list[list[Tensor]] = []
    for mode in ("none", "full", "selective"):
        mine = moe_compile.optimize(copy.deepcopy(model), config=quick(mode), example_inputs=(x,))
        torch.manual_seed(1)
        loss = mine(x).square().sum()
        loss.backward(retain_graph=mode != "none")
        found.append([loss.detach(), *(p.grad for p in mine.parameters() if p.grad is not None)])
        if mode != "none":
            with pytest.raises(RuntimeError, match="call the model again"):
                loss.backward()
    for values in found[1:]:
        assert len(values) == 9
        assert all(map(torch.equal, values, found[0]))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("compile", [False, COMPILED.compile], ids=["eager", "compiled"])
def test_our_own_top_k_runs_once(mode: str, compile: Any) -> None:
    x = torch.randn(2, 5, 8)
    model = Model(Picking)
    moe_compile.optimize(model, config=quick(mode, compile), example_inputs=(x,))
    with CountOps() as ops:
        model(x).square().sum().backward()
    assert ops.calls["moe_compile::top_k"] == 2

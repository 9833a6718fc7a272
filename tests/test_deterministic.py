"""`OptimizeConfig(deterministic=True)`: two runs give the same bits."""

import copy
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.install.compile import compile_options
from tests.families import build
from tests.pairs import COMPILED, inputs, step
from tests.parallel.models import call_of, gathered, optimized, small
from tests.ranks import on_ranks

CPU = torch.device("cpu")


@pytest.fixture
def strict() -> Generator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(model: Any, config: OptimizeConfig, device: str = "cpu") -> list[dict[str, Tensor]]:
    """Losses, logits and gradients of three steps of SGD from the same start."""
    torch.manual_seed(0)
    mine = moe_compile.optimize(copy.deepcopy(model), config=config)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    found: list[dict[str, Tensor]] = []
    for seed in range(3):
        call = inputs(batch=4, length=48, seed=seed)
        call = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in call.items()}
        found.append(step(mine, **call))
        optimizer.step()
    return found


def same_bits(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> None:
    for values, others in zip(one, two, strict=True):
        assert [n for n, v in values.items() if not torch.equal(v, others[n])] == []


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("compile", [False, COMPILED.compile], ids=["eager", "compiled"])
def test_two_runs_are_bit_equal(compile: Any) -> None:
    model = build("mixtral", attention_dropout=0.1)
    config = OptimizeConfig(deterministic=True, compile=compile, verify="off", autocast=False)
    same_bits(run(model, config), run(model, config))
    assert torch.are_deterministic_algorithms_enabled()


def two_runs_on_ranks() -> None:
    torch.use_deterministic_algorithms(True)
    rank = torch.distributed.get_rank()
    config = OptimizeConfig(deterministic=True, activation_checkpointing="full", autocast=False)
    runs = [gathered(step(optimized(small(), "ep", config), **call_of(rank))) for _ in range(2)]
    same_bits(runs[:1], runs[1:])


def test_two_runs_on_two_ranks_are_bit_equal() -> None:
    on_ranks(2, two_runs_on_ranks)


@pytest.mark.usefixtures("strict")
def test_nothing_is_chosen_by_a_timing() -> None:
    config = OptimizeConfig(deterministic=True, compile=True)
    assert compile_options(config, CPU) == {"fullgraph": True, "options": {"deterministic": True}}
    config = OptimizeConfig(deterministic=True, compile={"options": {"deterministic": False}})
    assert compile_options(config, CPU) == {"fullgraph": True, "options": {"deterministic": False}}
    (text,) = {
        choice.reason
        for site in moe_compile.explain(build("mixtral", torch.bfloat16), config=config).sites
        for choice in site.timings
    }
    assert text == "OptimizeConfig(deterministic=True): another run could choose another"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_two_runs_on_a_gpu_are_bit_equal(
    family: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model: Any = build(family, torch.bfloat16, hidden_size=256, num_hidden_layers=2)
    model.to("cuda")
    config = OptimizeConfig(deterministic=True, compile=compile)
    report = moe_compile.explain(model, config=config)
    assert {s.status for s in report.sites if s.kind == "experts"} == {"rewritten"}
    same_bits(run(model, config, "cuda"), run(model, config, "cuda"))

"""Router loads and the callback that evens them out, in one process and on two ranks."""

import copy
import functools
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer

import moe_compile
from moe_compile import OptimizeConfig, RouterBalance, RouterLoad
from moe_compile.balance import ROUTERS, Routers, add_everywhere
from tests.families import build
from tests.pairs import COMPILED, inputs, step
from tests.parallel.models import call_of, no_graph_breaks, optimized
from tests.ranks import on_ranks
from tests.trainers import trainer_logs

BIAS = "mlp.gate.e_score_correction_bias"
CALLS = [inputs(batch, length, seed) for seed, (batch, length) in enumerate([(2, 10), (1, 7)])]


def quick(model: nn.Module, **options: Any) -> Any:
    config = OptimizeConfig(verify="off", autocast=False, **options)
    return moe_compile.optimize(copy.deepcopy(model), config=config)


def picked(model: Any, calls: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What each block of experts of the untouched model is called with."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(
                lambda module, args, name=name: found[name].append(args[1].flatten())
            )
    for call in calls:
        model(**call)
    experts = model.config.n_routed_experts
    return {n: torch.cat(ids).bincount(minlength=experts) for n, ids in found.items()}


def loads(metrics: dict[str, float], name: str) -> list[float]:
    return [v for n, v in metrics.items() if n.startswith(f"router/{name}/tokens/")]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_counts_are_those_of_the_picks(mode: Any) -> None:
    model = build("deepseek_v3")
    want = picked(copy.deepcopy(model), CALLS)
    mine = quick(model, activation_checkpointing=mode)
    balance = RouterLoad(mine)
    assert balance.metrics() == {}
    for _ in range(2):
        for call in CALLS:
            step(mine, **call)
        mine.eval()(**CALLS[0])
        mine.train()
        balance.step()
        metrics = balance.metrics()
        assert len(want) == 2
        for name, counts in want.items():
            assert loads(metrics, name) == counts.tolist()
            worst = counts.max() / counts.double().mean()
            assert metrics[f"router/{name}/imbalance"] == pytest.approx(float(worst))
            assert metrics[f"router/{name}/dead_experts"] == int((counts == 0).sum())
        assert metrics["router/dead_experts"] == sum(int((c == 0).sum()) for c in want.values())
    balance.step()
    metrics = balance.metrics()
    assert (metrics["router/imbalance"], metrics["router/dead_experts"]) == (1.0, 16.0)
    assert {(type(name), type(value)) for name, value in metrics.items()} == {(str, float)}


def test_compiled_layers_count_without_a_graph_break() -> None:
    model = build("deepseek_v3", num_hidden_layers=2)
    want = picked(copy.deepcopy(model), CALLS)
    options: dict[str, Any] = {"compile": COMPILED.compile, "activation_checkpointing": "selective"}
    mine = quick(model, **options)
    with no_graph_breaks():
        step(mine, **CALLS[0])
        balance = RouterLoad(mine)
        for call in CALLS:
            step(mine, **call)
    balance.step()
    for name, counts in want.items():
        assert loads(balance.metrics(), name) == counts.tolist()


def test_gradient_checkpointing_of_the_model_counts_once() -> None:
    mine = quick(build("deepseek_v3"))
    mine.gradient_checkpointing_enable()
    balance = RouterLoad(get_peft_model(mine, LoraConfig(target_modules=["o_proj"])))
    step(mine, **CALLS[0])
    balance.step()
    assert sum(loads(balance.metrics(), "model.layers.1.mlp.experts")) == 2 * 10 * 2


def test_biases_move_against_the_load() -> None:
    model = build("deepseek_v3")
    mine = quick(model)
    balance = RouterBalance(mine, rate=0.01)
    for _ in range(2):
        want = picked(copy.deepcopy(mine), CALLS[:1])  # with the biases of now
        before = {n: b.clone() for n, b in mine.named_buffers() if n.endswith(BIAS)}
        step(mine, **CALLS[0])
        balance.step()
        assert len(before) == 2
        for name, bias in before.items():
            counts = want[name.replace("gate.e_score_correction_bias", "experts")].float()
            moved = bias + 0.01 * (counts.mean() - counts).sign()
            assert torch.equal(mine.get_buffer(name), moved)


def test_the_load_becomes_even() -> None:
    model: Any = build("deepseek_v3", n_group=1)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias[:2] += 0.3
    mine = quick(model)
    balance = RouterBalance(mine, rate=0.01)
    found: list[dict[str, float]] = []
    for _ in range(30):
        with torch.no_grad():
            mine(**inputs(8, 32))
        balance.step()
        found.append(balance.metrics())
    assert found[0]["router/imbalance"] > 3.5
    assert found[0]["router/dead_experts"] > 0
    assert found[-1]["router/imbalance"] < 1.4
    assert found[-1]["router/dead_experts"] == 0


def test_in_a_trainer_with_accumulation() -> None:
    mine = quick(build("deepseek_v3"))
    balance = RouterBalance(mine)
    kind = functools.partial(Trainer, callbacks=[balance.callback()])
    trainer_logs(mine, kind=kind, gradient_accumulation_steps=2, max_steps=2)
    assert sum(loads(balance.metrics(), "model.layers.1.mlp.experts")) == 2 * 2 * 10 * 2
    assert mine.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() > 0


def test_models_that_it_does_not_take() -> None:
    plain = build("mixtral")
    with pytest.raises(ValueError, match=r"got a Mixtral.*not optimized.*call optimize first"):
        RouterLoad(plain)
    mixtral = quick(plain)
    with pytest.raises(ValueError, match=r"no correction bias.*it takes .*use RouterLoad"):
        RouterBalance(mixtral)
    with pytest.raises(ValueError, match=r"got a rate of 0; it takes a positive number; leave"):
        RouterBalance(mixtral, rate=0)
    RouterLoad(mixtral)
    with pytest.raises(ValueError, match=r"counted already; it takes .*; use the"):
        RouterLoad(mixtral)
    refused = quick(plain)
    setattr(refused, ROUTERS, Routers(()))
    with pytest.raises(ValueError, match=r"without experts that optimize rewrote; it takes"):
        RouterLoad(refused)
    half: Any = build("deepseek_v3", torch.bfloat16)
    for layer in half.model.layers[1:]:
        layer.mlp.gate.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"correction_bias in torch.bfloat16; it takes float32"):
        RouterBalance(quick(half))


def on_two_ranks() -> None:
    rank, model = dist.get_rank(), build("deepseek_v3")
    calls = [call_of(r) for r in range(2)]
    want = picked(copy.deepcopy(model), calls)
    mine = optimized(model, "ep", OptimizeConfig(verify="off", autocast=False))
    balance = RouterBalance(mine)
    step(mine, **calls[rank])
    balance.step()
    metrics = balance.metrics()
    for name, counts in want.items():
        assert loads(metrics, name) == counts.tolist()
        bias = mine.get_buffer(name.replace("experts", "gate.e_score_correction_bias"))
        assert torch.equal(bias, 1e-3 * (counts.float().mean() - counts).sign())
    check_shard(rank)


def check_shard(rank: int) -> None:
    """A frozen parameter is a shard under FSDP2."""
    mesh = init_device_mesh("cpu", (2,))
    bias, change = torch.arange(5.0), torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    shard = distribute_tensor(bias, mesh, [Shard(0)])
    add_everywhere(shard, change)
    assert torch.equal(shard.full_tensor(), bias + change)
    assert len(shard.to_local()) == (3, 2)[rank]


def test_loads_of_all_ranks() -> None:
    on_ranks(2, on_two_ranks)

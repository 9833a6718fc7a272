"""What a model does around its experts on two ranks: checkpointing, LoRA, ties, generation."""

import contextlib
import copy
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.parallel import agree
from moe_compile.passes.facts import LOWERED
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.families import build
from tests.pairs import step, token_ids
from tests.parallel.models import (
    EXPERTS_ONLY,
    both,
    call_of,
    check_equal,
    check_step,
    no_graph_breaks,
    optimized,
    small,
)
from tests.ranks import on_ranks
from tests.trainers import SGD, trainer_logs

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


def tied_frozen_and_checkpointed(mesh: str) -> None:
    model = small("qwen3_moe", mlp_only_layers=[], tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    model, reference = both(mesh, model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_step(model, reference)
    model.gradient_checkpointing_enable()
    check_step(model, reference)


def recomputed_experts() -> None:
    model, reference = both("dp_shard x ep", small())
    calls: list[int] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    check_step(model, reference)
    assert len(calls) == 2


@pytest.mark.matrix
def test_experts_are_recomputed() -> None:
    on_ranks(4, recomputed_experts)


def with_lora(model: Any, **target: Any) -> Any:
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, **target))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    return wrapped


def lora_before(mesh: str) -> None:
    model, reference = both(mesh, with_lora(small(), target_modules=["q_proj", "v_proj"]))
    assert any("experts" in s.kind and s.status == "rewritten" for s in report(model).sites)
    check_step(model, reference)


def lora_after() -> None:
    model = optimized(small(), "ep")
    model(**call_of(0))
    wrapped = with_lora(model, target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match=r"q_proj.*added after optimize.*before optimize"):
        wrapped(**call_of(0))


def lora_on_experts(mesh: str) -> None:
    target = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model, reference = both(mesh, with_lora(small(), **target))
    (site,) = [s for s in report(model).sites if s.kind == "experts"]
    assert site.status == "refused"
    check_step(model, reference)


def report(model: Any) -> moe_compile.Report:
    return moe_compile.report(model)


def around_experts(mesh: str) -> None:
    tied_frozen_and_checkpointed(mesh)
    lora_before(mesh)
    lora_on_experts(mesh)
    if mesh == "ep":
        lora_after()


@pytest.mark.parametrize(
    ("mesh", "ranks"), [("ep", 2), pytest.param("dp_shard x ep", 4, marks=pytest.mark.matrix)]
)
def test_ties_frozen_experts_recomputation_and_lora(mesh: str, ranks: int) -> None:
    on_ranks(ranks, around_experts, mesh)


def compiled() -> None:
    config = OptimizeConfig(compile={"backend": "aot_eager"})
    model, reference = both("ep", small("qwen3_moe", num_hidden_layers=4), config)
    with no_graph_breaks():
        for _ in range(2):
            check_step(model, reference, output_router_logits=True)
        # The first layer is dense; the others are one kind, and share one graph.
        assert counters["stats"]["unique_graphs"] == 2
        model.gradient_checkpointing_enable()
        check_step(model, reference)
        check_generation(model, reference)


def check_generation(model: Any, reference: Any) -> None:
    """Ranks whose sequences end at different lengths go on together."""
    rank = dist.get_rank()
    prompt = token_ids(1, 4 + rank, seed=rank)
    options = {"max_new_tokens": 4 + 3 * rank}
    for each in (model, reference):
        each.eval()
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 1.5}):
        written: list[Any] = []
        for each in (model, reference):
            torch.manual_seed(rank)
            written.append(each.generate(prompt, **options, **sampling))
        assert torch.equal(*written)
    for each in (model, reference):
        each.train()


def test_compiled_without_a_graph_break() -> None:
    on_ranks(2, compiled)


def trained(folder: Path) -> list[dict[str, float]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    logs = trainer_logs(optimized(small(), "ep"), **SGD)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    agree.PATIENCE = timedelta(seconds=2)
    model = optimized(small(), "ep")
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"none from rank 1; .*TrainerMixin"):
            trainer_logs(model, folder=folder, **SGD | saving)
    else:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone
            trainer_logs(model, folder=folder, **SGD | saving)
    return logs


def test_the_trainer(tmp_path: Path) -> None:
    """Losses and norms are those of one process with the batches of both; saving is an error."""
    wanted = trainer_logs(small(), **SGD, per_device_train_batch_size=4)
    for logs in on_ranks(2, trained, tmp_path):
        for mine, theirs in zip(logs, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


def from_meta() -> None:
    with torch.device("meta"):
        model = small()
    model = optimized(model, "ep")
    full = sum(p.numel() for p in small().parameters())
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.to_local().numel() for p in model.parameters()) <= 0.55 * full


def test_a_model_on_the_meta_device() -> None:
    on_ranks(2, from_meta)


def disagreeing() -> None:
    model = small(num_experts_per_tok=1 + dist.get_rank())
    with pytest.raises(ValueError, match=r"different plans on its ranks: rank 0 has .* rank 1 has"):
        optimized(model, "ep")
    check_failing_and_other_passes()
    model = small(num_local_experts=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"got 2 ranks for ep, .* has 3 experts; .*: 1, 3"):
        optimized(model, "ep")
    check_equal(dict(model.state_dict()), dict(before))
    step(model, **call_of(0))


@dataclass(frozen=True)
class Swap(Pass):
    """Finds nothing new: it changes how a rank computes what all of them found."""

    name = "swap"
    needs = frozenset({LOWERED})
    gives = frozenset({LOWERED})

    def run(self, unit: UnitGraph) -> int:
        nodes = [n for n in unit.graph.nodes if n.target is torch.ops.aten.add.Tensor]
        for node in nodes if dist.get_rank() else []:
            node.args = node.args[::-1]
        return len(nodes)


@dataclass(frozen=True)
class Failing(Pass):
    """A pass of a user's that does not work everywhere."""

    name = "failing"

    def run(self, unit: UnitGraph) -> int:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("on this rank")
        return 0


def check_failing_and_other_passes() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = small()
    with pytest.raises(ValueError, match=r"different plans .*aten.add.*aten.add"):
        moe_compile.optimize(model, mesh, passes=EXPERTS_ONLY.after("lower", Swap()))
    expected = (RuntimeError, ZeroDivisionError)[dist.get_rank()]
    with pytest.raises(expected, match="on this rank") as caught:
        moe_compile.optimize(model, mesh, passes=EXPERTS_ONLY.before("lower", Failing()))
    if dist.get_rank() == 0:
        assert "optimize failed on rank 1: ZeroDivisionError" in str(caught.value)
    given = model if dist.get_rank() else "no model"
    with pytest.raises((ValueError, RuntimeError), match="optimize got a str; it takes"):
        moe_compile.optimize(given, mesh)  # type: ignore[type-var]


def tied() -> None:
    model = build("mixtral")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    model, reference = both("ep", model)
    assert second.self_attn.q_proj.weight is first.self_attn.q_proj.weight
    check_step(model, reference)
    check_step(model, reference)
    model = build("mixtral")
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight
    with pytest.raises(ValueError, match=r"norm.weight, which are one parameter; .*; untie"):
        optimized(model, "ep")
    model = small()
    experts = model.model.layers[0].mlp.experts
    experts.register_parameter("twin", experts.down_proj)
    model = optimized(model, "ep")
    (site,) = [s for s in report(model).sites if s.kind == "experts"]
    assert site.reason == "its experts are tied to those of another module"


def test_ties() -> None:
    on_ranks(2, tied)


def test_errors() -> None:
    on_ranks(2, disagreeing)

"""What a model does around its experts on two ranks: checkpointing, LoRA, ties, generation."""

import copy
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import build
from tests.pairs import step, token_ids
from tests.parallel.models import (
    both,
    call_of,
    check_equal,
    check_step,
    no_graph_breaks,
    optimized,
    small,
)
from tests.ranks import on_ranks
from tests.trainers import trainer_losses

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


def tied_frozen_and_checkpointed() -> None:
    model = small("qwen3_moe", mlp_only_layers=[], tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    model, reference = both("ep", model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_step(model, reference)
    model.gradient_checkpointing_enable()
    check_step(model, reference)


def test_tied_embeddings_frozen_experts_and_recomputation() -> None:
    on_ranks(2, tied_frozen_and_checkpointed)


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


def lora_before() -> None:
    model, reference = both("ep", with_lora(small(), target_modules=["q_proj", "v_proj"]))
    assert any("experts" in s.kind and s.status == "rewritten" for s in report(model).sites)
    check_step(model, reference)


def lora_after() -> None:
    model = optimized(small(), "ep")
    model(**call_of(0))
    wrapped = with_lora(model, target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match=r"q_proj.*added after optimize.*before optimize"):
        wrapped(**call_of(0))


def lora_on_experts() -> None:
    target = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model, reference = both("ep", with_lora(small(), **target))
    (site,) = [s for s in report(model).sites if s.kind == "experts"]
    assert site.status == "refused"
    check_step(model, reference)


def report(model: Any) -> moe_compile.Report:
    return moe_compile.report(model)


def test_lora() -> None:
    on_ranks(2, lora_before)
    on_ranks(2, lora_after)


def test_lora_on_experts() -> None:
    on_ranks(2, lora_on_experts)


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
    options = {"max_new_tokens": 4 + 3 * rank, "do_sample": False}
    for each in (model, reference):
        each.eval()
    mine, theirs = (each.generate(prompt, **options) for each in (model, reference))
    assert torch.equal(mine, theirs)
    for each in (model, reference):
        each.train()


def test_compiled_without_a_graph_break() -> None:
    on_ranks(2, compiled)


def trained() -> None:
    """Hugging Face's Trainer gives what it gives with DDP."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    model, reference = both("ep", small())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of DDP
        mine, theirs = (trainer_losses(each, rows=12) for each in (model, reference))
    assert len(mine) == 3
    assert mine == pytest.approx(theirs, rel=1e-4)


def test_the_trainer() -> None:
    on_ranks(2, trained)


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
    model = small(num_local_experts=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"got 2 ranks for ep, .* has 3 experts; .*: 1, 3"):
        optimized(model, "ep")
    check_equal(dict(model.state_dict()), dict(before))
    step(model, **call_of(0))


def tied() -> None:
    model = build("mixtral")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"q_proj.weight, which are one parameter; .*; untie"):
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

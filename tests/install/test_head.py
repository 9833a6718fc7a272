import copy
from typing import Any

import pytest
import torch
from torch import nn

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.install.deferred_logits import DeferredLogits
from moe_compile.install.head import install_head, plan_head
from tests.families import build

IDS = torch.arange(20).view(2, 10)


def with_head(model: Any, **options: Any) -> Any:
    """A copy of the model with nothing but its head rewritten."""
    model = copy.deepcopy(model)
    install_head(model, plan_head(model, OptimizeConfig(**options)), sharded=False)
    return model


def step(model: Any, **call: Any) -> dict[str, Any]:
    out = model(input_ids=IDS, use_cache=False, **call)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


@pytest.mark.parametrize(
    "call",
    [
        {"labels": IDS},
        {"labels": IDS.where(IDS % 3 > 0, -100), "num_items_in_batch": torch.tensor(7)},
        {"labels": IDS[:, -4:], "logits_to_keep": 4},
        {"labels": IDS, "output_router_logits": True},
    ],
)
def test_a_training_step_is_the_same(call: dict[str, Any]) -> None:
    model = build("qwen3_moe").train()
    got, want = step(with_head(model), **call), step(model, **call)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_a_bias_and_tied_embeddings() -> None:
    model: Any = build("qwen3_moe").train()
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))
    model.lm_head.weight = model.model.embed_tokens.weight
    got, want = step(with_head(model), labels=IDS), step(model, labels=IDS)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_logits_are_deferred_where_a_step_may_follow() -> None:
    model = with_head(build("qwen3_moe"))
    assert type(model.train()(input_ids=IDS).logits) is DeferredLogits
    with torch.no_grad():
        assert type(model(input_ids=IDS).logits) is torch.Tensor
    assert type(model.eval()(input_ids=IDS).logits) is torch.Tensor


def test_half_precision_that_needs_a_scaler_has_its_logits() -> None:
    model = with_head(build("qwen3_moe")).train()
    with torch.autocast("cpu", torch.float16):
        assert type(model.lm_head(torch.ones(2, 32))) is torch.Tensor
    with torch.autocast("cpu", torch.bfloat16):
        assert type(model.lm_head(torch.ones(2, 32))) is DeferredLogits


def test_a_copy_has_its_own_head() -> None:
    model = with_head(build("qwen3_moe")).train()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(input_ids=IDS).logits.any() == torch.tensor(False)
    assert model(input_ids=IDS).logits.any()


def test_the_report_tells_of_the_loss() -> None:
    model = build("qwen3_moe")
    found = moe_compile.explain(model, config=OptimizeConfig(autocast=False, verify="off"))
    last = found.sites[-1]
    assert (last.module, last.kind) == ("lm_head", "loss")
    assert (last.status, last.provider) == ("rewritten", "torch")
    plan = plan_head(model, OptimizeConfig(loss="model"))
    assert plan is not None
    assert plan.site.reason == "OptimizeConfig(loss='model') asks for the model's own"


def test_a_head_that_is_no_linear_keeps_its_loss() -> None:
    class Own(nn.Linear):
        pass

    model: Any = build("qwen3_moe").train()
    own = Own(*reversed(model.lm_head.weight.shape), bias=False)
    own.weight = model.lm_head.weight
    model.lm_head = own
    plan = plan_head(model, OptimizeConfig())
    assert plan is not None
    assert plan.site.reason == "the head is a Own"
    assert type(with_head(model)(input_ids=IDS).logits) is torch.Tensor
    with pytest.raises(ValueError, match=r"OptimizeConfig.loss got 'fused' .* the head is a Own"):
        with_head(model, loss="fused")


def test_no_known_head() -> None:
    assert plan_head(nn.Linear(2, 3), OptimizeConfig()) is None
    with pytest.raises(ValueError, match="no head is known"):
        plan_head(nn.Linear(2, 3), OptimizeConfig(loss="fused"))

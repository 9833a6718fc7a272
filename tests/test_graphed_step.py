"""`GraphedStep`: a captured step is the model's own, and what cannot be captured is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from moe_compile import GraphedStep, OptimizeConfig, RouterLoad
from moe_compile.adapters.transformers import attention_kind, without_masks
from tests.families import build
from tests.pairs import error, pair, token_ids
from tests.parallel.models import optimized, small
from tests.ranks import on_ranks


def on_two_ranks_it_takes_what_can_be_captured() -> None:
    gathered: Any = {"reshard_after_forward": False}
    cases: list[tuple[str, Any]] = [("ep", "auto"), ("ep", gathered), ("dp_shard", "auto")]
    for mesh, fsdp in cases:
        config = OptimizeConfig(autocast=False, verify="off", fsdp=fsdp)
        with pytest.raises(ValueError, match="on several ranks it takes DeepEP that does not wait"):
            GraphedStep(optimized(small(), mesh, config))
    config = OptimizeConfig(autocast=False, verify="off", fsdp=gathered)
    with pytest.raises(ValueError, match="it takes one on cuda"):
        GraphedStep(optimized(small(), "dp_shard", config))


def test_on_two_ranks_it_takes_what_can_be_captured() -> None:
    on_ranks(2, on_two_ranks_it_takes_what_can_be_captured)


FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"]


def test_without_masks_layers_get_none_and_the_loss_is_the_same() -> None:
    model = pair("qwen3_moe").copies().optimized
    masks: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    ids = token_ids()
    # A name that is no row's: transformers takes positions that begin anew for packed rows.
    packed = torch.arange(10).remainder(5).expand(2, -1)
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    with without_masks(model):
        assert attention_kind(model) != "sdpa"
        got = model(input_ids=ids, labels=ids, use_cache=False).loss
        model(input_ids=ids, position_ids=packed, use_cache=False)
    assert attention_kind(model) == "sdpa"
    model(input_ids=ids, position_ids=packed, use_cache=False)
    assert [mask is None for mask in masks] == [True, True, True, False]
    assert torch.equal(got, expected)


def test_a_model_that_cannot_be_graphed_is_an_error() -> None:
    with pytest.raises(ValueError, match="was not optimized"):
        GraphedStep(build("mixtral"))
    with pytest.raises(ValueError, match=r"on cpu with the attention 'sdpa'; it takes one on cuda"):
        GraphedStep(pair("mixtral").optimized)
    model = moe_compile.optimize(nn.Sequential(nn.Linear(2, 2)), example_inputs=(torch.ones(1, 2),))
    with pytest.raises(ValueError, match="with the attention None"):
        GraphedStep(model)


def on_gpu(family: str, **options: Any) -> Any:
    model: Any = build(family, torch.bfloat16, hidden_size=256, num_hidden_layers=2, **options)
    return moe_compile.optimize(model.to("cuda"), config=OptimizeConfig(measure=False))


def batches(length: int = 48) -> list[dict[str, Tensor]]:
    made = [token_ids(4, length, seed).to("cuda") for seed in range(3)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(model: nn.Module, other: nn.Module) -> None:
    mine, expected = gradients(model), gradients(other)
    assert mine.keys() == expected.keys()
    assert {n: e for n, g in mine.items() if (e := error(g, expected[n])) > 0.02} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
class TestOnAGPU:
    """Beside the same model, called as ever."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_step_is_the_models_own(self, family: str) -> None:
        model = on_gpu(family)
        other = copy.deepcopy(model)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other)]
        step = GraphedStep(model)
        for batch in batches() + batches(32):
            loss = step(**batch)
            expected = other(**batch, use_cache=False).loss
            expected.backward()
            assert error(loss, expected.detach()) < 1e-3
            check_same(model, other)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def test_gradients_are_added_up(self) -> None:
        model = on_gpu("qwen3_moe")
        other = copy.deepcopy(model)
        step = GraphedStep(model)
        for batch in batches():
            step(**batch)
            other(**batch, use_cache=False).loss.backward()
        check_same(model, other)

    def test_dropout_draws_anew_and_nothing_else_changes(self) -> None:
        model = on_gpu("mixtral", attention_dropout=0.5)
        load = RouterLoad(model)
        torch.cuda.manual_seed(0)
        before = torch.cuda.get_rng_state()
        step = GraphedStep(model)
        batch = batches()[0]
        step(**batch)
        load.step()
        picks = sum(v for n, v in load.metrics().items() if "/tokens/" in n)
        assert picks == 2 * 2 * batch["input_ids"].numel()
        assert not torch.equal(torch.cuda.get_rng_state(), before)
        assert len({step(**batch).item() for _ in range(3)}) == 3

    def test_what_it_does_not_take_is_an_error(self) -> None:
        model = on_gpu("qwen3_moe")
        step = GraphedStep(model)
        batch: dict[str, Any] = batches()[0]
        number: Any = 3
        with pytest.raises(ValueError, match=r"got {'input_ids': device\(type='cpu'\)}"):
            step(**batch | {"input_ids": batch["input_ids"].cpu()})
        with pytest.raises(ValueError, match=r"got {'num_items_in_batch': 'int'}"):
            step(**batch, num_items_in_batch=number)
        with pytest.raises(ValueError, match="whole rows, without masks"):
            step(**batch, attention_mask=torch.ones_like(batch["labels"]))
        windowed = GraphedStep(on_gpu("mixtral", sliding_window=8))
        with pytest.raises(ValueError, match=r"layer model\.layers\.0 needs a mask"):
            windowed(**batch)

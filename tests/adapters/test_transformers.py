"""Attention that cannot be traced: other kernels than torch's, and masks that are no tensors."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moe_compile
from tests.families import build

NAME = "foreign-attention"
REASON = "foreign_attention is a custom autograd function"


@dataclass
class Mask:
    """What only the kernels of an attention understand."""

    seen: Tensor | None

    def __post_init__(self) -> None:
        # As the masks of flex_attention, it is not made on fake tensors.
        assert self.seen is None or bool(self.seen.any())


def masked(**options: Any) -> Mask:
    return Mask(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**options))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any
) -> tuple[Tensor, None]:
    assert isinstance(mask, Mask), "the model makes its own masks"
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask.seen, **options)


@pytest.fixture(autouse=True)
def foreign() -> Iterator[None]:
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, masked)
    yield
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]


def gradients(model: Any, **inputs: Tensor) -> list[Tensor]:
    loss = model(labels=inputs["input_ids"], use_cache=False, **inputs).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("compiled", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_rest_is_rewritten_and_attention_runs_as_it_is(family: str, compiled: Any) -> None:
    model = build(family)
    model.set_attn_implementation(NAME)
    original = copy.deepcopy(model)
    moe_compile.optimize(model, config=moe_compile.OptimizeConfig(compile=compiled))
    sites = moe_compile.report(model).sites
    assert {s.status for s in sites if s.kind == "experts"} == {"rewritten"}
    attention = [s for s in sites if s.kind == "attention"]
    assert attention
    assert all(REASON in str(site.reason) for site in attention)
    assert model.config._attn_implementation == NAME
    ids = torch.randint(64, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        for value, wanted in zip(
            gradients(model, **inputs), gradients(original, **inputs), strict=True
        ):
            assert (value - wanted).norm() <= 1e-5 * wanted.norm()

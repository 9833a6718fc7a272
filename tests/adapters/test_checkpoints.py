"""What another release of transformers may lack."""

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_compile.adapters.checkpoints import settle_dtypes
from tests.families import build


def test_a_release_without_a_plan_of_dtypes_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = build("mixtral", torch.bfloat16)
    model.to("meta")
    monkeypatch.delattr(PreTrainedModel, "_get_dtype_plan")
    with caplog.at_level(logging.WARNING):
        settle_dtypes(model)
    assert "which tensors of MixtralForCausalLM stay in float32" in caplog.text
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

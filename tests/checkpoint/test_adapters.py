"""Adapters come back as `save_pretrained` wrote them; on two ranks in test_save.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from moe_compile.checkpoint.adapters import load_adapters
from tests.checkpoint.folders import check_load_adapters
from tests.families import build

FILE = "adapter_model.safetensors"


def lora_config(rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)


def wrapped() -> Any:
    model = get_peft_model(build("mixtral", num_hidden_layers=1), lora_config())
    model.add_adapter("other", lora_config(rank=3))
    return model


def own() -> Any:
    """As transformers puts an adapter into a model, with no wrapper."""
    model = build("mixtral", num_hidden_layers=1)
    model.add_adapter(lora_config())
    return model


@pytest.mark.parametrize("make", [wrapped, own])
def test_what_was_saved_comes_back(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    check_load_adapters(model, tmp_path)


def test_another_adapter(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    name, *others = stored
    save_file({n: stored[n] for n in others} | {name: stored[name][:1].clone()}, tmp_path / FILE)
    check_refused(model, tmp_path, rf"other adapters than the model \({name}: missing, unknown")
    (tmp_path / FILE).unlink()
    check_refused(model, tmp_path, f"which has no {FILE}; it takes a checkpoint")


def check_refused(model: nn.Module, folder: Path, match: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        load_adapters(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

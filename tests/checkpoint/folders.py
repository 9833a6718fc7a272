"""Checkpoints in folders, compared bit by bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe_compile import OptimizeConfig
from moe_compile.checkpoint.adapters import load_adapters

QUICK = OptimizeConfig(compile=False, verify="off")


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, where its index says it is."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    assert index.exists() != single.exists()
    if single.exists():
        return load_file(single)
    places = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(places.values())}
    assert sum(map(len, files.values())) == len(places)
    return {key: files[name][key] for key, name in places.items()}


def check_stored(folder: Path, plain: Path) -> None:
    """The same tensors and configs as one process writes."""
    check_same(stored(folder), stored(plain))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((plain / name).read_text())


def check_same(values: dict[str, Tensor], references: dict[str, Tensor]) -> None:
    assert values.keys() == references.keys()
    other = {n: (v.dtype, references[n].dtype) for n, v in values.items()}
    assert {n: dtypes for n, dtypes in other.items() if dtypes[0] != dtypes[1]} == {}
    assert [n for n, v in values.items() if not torch.equal(v, references[n])] == []


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, whole; all ranks must call it."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    with torch.no_grad():
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named}


def on_meta(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@torch.no_grad()
def check_load_adapters(model: Any, folder: Path) -> None:
    """They come back, each rank's shards of them, once they are lost."""
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    before = {n: local(p).clone() for n, p in adapters.items()}
    assert any(value.any() for value in before.values())
    for parameter in adapters.values():
        parameter.zero_()
    load_adapters(model, folder)
    assert all(torch.equal(local(p), before[n]) for n, p in adapters.items())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

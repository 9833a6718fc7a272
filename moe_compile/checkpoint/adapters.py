"""Loads PEFT's adapters into a model, whatever mesh it is on."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_compile.adapters import checkpoints
from moe_compile.checkpoint.load import fill

_FILE = "adapter_model.safetensors"


@torch.no_grad()
def load_adapters(model: nn.Module, folder: Path) -> None:
    """Gives a model's adapters the values that its `save_pretrained` has written.

    Raises:
        ValueError: for a file that is not there, and for tensors or shapes that are not those of
            the model; the model is then as it was.
    """
    adapters = checkpoints.adapter_states(model, model.state_dict(keep_vars=True), {})
    assert adapters is not None, "a model with adapters"
    stored = {name: _read(folder / name / _FILE, tensors) for name, tensors in adapters.items()}
    for name, tensors in adapters.items():
        for key, own in tensors.items():
            fill(own, stored[name][key])


def _read(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"Trainer got {path.parent} to load adapters from, which has no {path.name}; it takes "
            "a checkpoint of a model with the same adapters; choose one that is whole"
        )
    stored = load_file(path)
    wanted = {key: tensor.shape for key, tensor in tensors.items()}
    got = {key: tensor.shape for key, tensor in stored.items()}
    differing = sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k))
    if differing:
        raise ValueError(
            f"Trainer got {path}, which has other adapters than the model ({', '.join(differing)}: "
            "missing, unknown, or of another shape); it takes those that the model saves; give the "
            "model the adapters of the folder's adapter_config.json"
        )
    return stored

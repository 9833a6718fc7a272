"""The safetensors files of a checkpoint, each opened once, read a tensor at a time."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Files:
    """What a folder holds, by key.

    Raises:
        ValueError: if the folder does not exist, or has no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Any] = {}
        for path in _paths(folder):
            file: Any = safe_open(path, framework="pt")
            self._file |= dict.fromkeys(file.keys(), file)

    def keys(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._file.keys()

    def read(self, key: str) -> Tensor:
        """A tensor, on the CPU."""
        return self._file[key].get_tensor(key)

    def on_meta(self, key: str) -> Tensor:
        """A tensor's shape, without reading it."""
        return torch.empty(self._file[key].get_slice(key).get_shape(), device="meta")


def _paths(folder: Path) -> list[Path]:
    """One file, or those of the index, as transformers looks for them."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        what = f"has no {_SINGLE} and no {_INDEX}" if folder.is_dir() else "is no folder"
        raise ValueError(
            f"load_pretrained got {folder}, which {what}; it takes a folder with safetensors "
            "files; download one with huggingface_hub.snapshot_download, or save one with "
            "save_pretrained"
        )
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise ValueError(
            f"load_pretrained got {folder}, whose index names {', '.join(absent)}, which are not "
            "there; it takes a whole checkpoint; download or save it again"
        )
    return [folder / name for name in sorted(names)]

"""Streams a checkpoint into a model, one tensor at a time; each rank keeps its own shards.

A tensor is converted whole before its shard is taken: a conversion may move data across the
dimension that is sharded, so the shard of what is stored need not be the shard of what is needed.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_compile.adapters import checkpoints
from moe_compile.adapters.checkpoints import Conversion, Loading
from moe_compile.adapters.transformers import is_pretrained
from moe_compile.checkpoint.files import Files
from moe_compile.parallel.experts import local_part
from moe_compile.parallel.layout import device_on


@torch.no_grad()
def load_pretrained(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint into a model, whatever mesh it is on; tensors on meta get memory first.

    Gives the values that `from_pretrained` gives. No rank ever holds more than its own shards and
    one parameter. Create the optimizer afterwards: parameters that were on meta are new ones.

    Args:
        model: a transformers model, optimized or not, on the meta device or any other.
        path: a folder with safetensors files, as from the hub or from `save_pretrained`.

    Raises:
        ValueError: for a folder without safetensors files, for keys or shapes that are not those
            of the model, and for tied parameters that differ; the model is then as it was.
    """
    if not is_pretrained(model) or checkpoints.is_wrapper(model):
        raise ValueError(
            f"load_pretrained got a {type(model).__name__}; it takes a transformers model without "
            "a PEFT wrapper; load the checkpoint with from_pretrained before the adapters are added"
        )
    files = Files(Path(path))
    plan = checkpoints.loading(model, files.keys())
    _check(model, plan, files)
    had_meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    _materialize(model)
    tensors = model.state_dict(keep_vars=True)
    loaded = [name for c in plan.conversions for name in _load(c, tensors, files)]
    if had_meta:
        checkpoints.initialize_rest(model, [tensors[name] for name in loaded])
    checkpoints.finish_loading(model, plan.transforms, files.folder)


def _load(conversion: Conversion, tensors: dict[str, Tensor], files: Files) -> list[str]:
    dtype = tensors[conversion.target].dtype
    made = conversion.make(lambda key: files.read(key).to(dtype))
    for name, whole in made.items():
        fill(tensors[name], whole)
    return list(made)


def fill(own: Tensor, whole: Tensor) -> None:
    """Copies the values of a whole tensor into a model's own, or this rank's shard of them."""
    if isinstance(own, DTensor):
        whole, own = local_part(whole, own.device_mesh, own.placements), own.to_local()
    own.copy_(whole)


def _materialize(model: nn.Module) -> None:
    """Gives tensors on meta memory, without values; tied ones stay tied.

    FSDP2 looks for new parameters when it first runs.
    """
    device = _device_of(model)
    new: dict[Tensor, Tensor] = {}
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in new:
                        new[tensor] = _empty(tensor, device)
                    held[name] = new[tensor]


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def _device_of(model: nn.Module) -> torch.device:
    """This rank's device on the model's mesh, or the default one."""
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return torch.get_default_device()
    return device_on(mesh)


def _check(model: nn.Module, plan: Loading, files: Files) -> None:
    """Everything that can be wrong, from shapes alone."""
    tensors = model.state_dict(keep_vars=True)
    makers: dict[str, Conversion] = {}
    problems: list[str] = []
    unexpected = set(plan.unexpected)
    for conversion in plan.conversions:
        made = conversion.make(files.on_meta)
        makers |= dict.fromkeys(made, conversion)
        unexpected |= {name for name in made if name not in tensors}
        problems += [
            f"{name} has shape {tuple(made[name].shape)}, the model's has "
            f"{tuple(tensors[name].shape)}"
            for name in made
            if name in tensors and made[name].shape != tensors[name].shape
        ]
    missing = _missing(tensors, makers)
    missing, unexpected = checkpoints.ignore_known(model, missing, unexpected)
    problems += [f"{name} is missing" for name in sorted(missing)]
    problems += [
        f"{name} is in the checkpoint, and not in the model" for name in sorted(unexpected)
    ]
    problems += [] if problems else _untied(tensors, makers, files)
    if problems:
        raise ValueError(
            f"load_pretrained got {files.folder}, which does not fit a {type(model).__name__}:\n  "
            + "\n  ".join(problems)
            + "\nit takes a checkpoint of the model; build the model from the checkpoint's own "
            "config.json"
        )


def _ties(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names of each tensor of the model."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[tensor].append(name)
    return list(names.values())


def _missing(tensors: dict[str, Tensor], makers: dict[str, Conversion]) -> set[str]:
    """Tied parameters need only one of their names."""
    return {n for tie in _ties(tensors) if makers.keys().isdisjoint(tie) for n in tie}


def _untied(tensors: dict[str, Tensor], makers: dict[str, Conversion], files: Files) -> list[str]:
    """Tied parameters that a checkpoint has more than once, with different values."""
    problems: list[str] = []
    for tie in _ties(tensors):
        first, *others = [name for name in tie if name in makers] or [""]
        for other in others:
            values = [makers[name].make(files.read)[name] for name in (first, other)]
            if not torch.equal(*values):
                problems.append(
                    f"{first} and {other} differ in the checkpoint and are tied in the model: set "
                    "tie_word_embeddings=False in its config"
                )
    return problems

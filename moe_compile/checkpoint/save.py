"""`save_pretrained` of a model on several ranks: the files that one process would write.

Every rank plans the same from shapes alone. Files are written in rounds, one file a rank: in a
round each parameter that feeds it is gathered once, on all ranks, and each rank keeps what its own
file needs. What was saved before is there until all of it is written.
"""

import functools
import inspect
import json
import math
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_compile.adapters import checkpoints
from moe_compile.adapters.checkpoints import Conversion
from moe_compile.adapters.transformers import base_model, is_pretrained
from moe_compile.checkpoint.publish import (
    beside,
    index_name,
    make_beside,
    publish,
    sync_file,
    weights_name,
)
from moe_compile.parallel.agree import meet, on_every_rank
from moe_compile.parallel.layout import Layout

_SMALL_FILE = 10**9
_LARGE_FILE = 50 * 10**9

_NOT_HERE = {
    "push_to_hub": "save to a folder, then upload it with huggingface_hub.upload_folder",
    "distributed_checkpoint": "leave it out: every rank writes its part as it is",
}


@dataclass(frozen=True)
class _Plan:
    """What is written where.

    Attributes:
        made: for each conversion, the keys that it makes.
        files: the keys of each file; a file's place decides which rank writes it, and when.
        index: what says where each key is; None for a single file.
    """

    made: list[tuple[Conversion, set[str]]]
    files: list[tuple[str, list[str]]]
    index: dict[str, Any] | None


def bind_save(model: nn.Module, layout: Layout) -> None:
    """Makes `save_pretrained` of a transformers model, and of PEFT's around it, save all ranks."""
    if not is_pretrained(model):
        return
    for module in {model, base_model(model)}:
        bound: Any = module
        bound.save_pretrained = types.MethodType(_make_save(type(module), layout), module)


def _make_save(kind: Any, layout: Layout) -> Callable[..., None]:
    original: Callable[..., None] = kind.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        options = dict(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        del options["self"]
        rest: dict[str, Any] = options.pop("kwargs", {})
        _save(self, options | rest, layout)

    return save_pretrained


def _save(model: nn.Module, options: dict[str, Any], layout: Layout) -> None:
    _check(options)
    state = options.get("state_dict")
    given = model.state_dict() if state is None else state
    adapters = checkpoints.adapter_names(model, given, options)
    sharded = any(isinstance(tensor, DTensor) for tensor in given.values())
    whole = state is None and adapters is None
    if whole or sharded:
        meet("save_pretrained", layout.group)
    if whole:
        _save_model(model, options, layout)
        return
    first = layout.rank == 0
    if sharded:
        given = {name: _whole(given[name], first) for name in adapters or given}
    write = functools.partial(_save_alone, model, options | {"state_dict": given})
    # A user's own tensors may be on one rank only, so they take no part in anything collective.
    if sharded:
        _on_all(layout, lambda: write() if first else None)
    elif first:
        write()


def _save_alone(model: nn.Module, options: dict[str, Any]) -> None:
    """What one rank saves, as the class does."""
    folder = Path(options["save_directory"])
    written = make_beside(folder)
    card = folder / "README.md"
    if card.exists():  # PEFT adds to it
        shutil.copy(card, written)
    checkpoints.class_save(model, options | {"save_directory": written})
    publish(folder, options.get("variant"))


def _check(options: dict[str, Any]) -> None:
    for name, advice in _NOT_HERE.items():
        if options.get(name):
            raise ValueError(
                f"save_pretrained got {name}={options[name]!r}; on several ranks it takes False; "
                f"{advice}"
            )
    if Path(options["save_directory"]).is_file():
        raise ValueError(
            f"save_pretrained got {options['save_directory']}, which is a file; it takes a folder; "
            "choose another name"
        )


def _save_model(model: nn.Module, options: dict[str, Any], layout: Layout) -> None:
    folder, variant = Path(options["save_directory"]), options.get("variant")
    plan = _plan(model, options, layout.ranks)
    first = layout.rank == 0
    _on_all(layout, lambda: _write_configs(model, options) if first else None)
    for start in range(0, len(plan.files), layout.ranks):
        names = plan.files[start : start + layout.ranks]
        tensors = _gather(model, plan, names, layout.rank)
        write = functools.partial(_write_file, beside(folder), names, layout.rank, tensors)
        _on_all(layout, write)
    _on_all(layout, lambda: _finish(folder, plan, variant) if first else None)


def _plan(model: Any, options: dict[str, Any], ranks: int) -> _Plan:
    state = checkpoints.stored_state(model)
    conversions = _conversions(model, state, options)
    made = [conversion.make(state.__getitem__) for conversion in conversions]
    # Fresh ones: the size of a part of a tensor would be that of the whole.
    sizes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for tensors in made
        for name, tensor in tensors.items()
    }
    split = split_torch_state_dict_into_shards(
        sizes,
        filename_pattern=weights_name(options.get("variant"), "{suffix}"),
        max_shard_size=options.get("max_shard_size") or _file_size(sizes, ranks),
    )
    index = {
        "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return _Plan(
        [(c, set(tensors)) for c, tensors in zip(conversions, made, strict=True)],
        list(split.filename_to_tensors.items()),
        index if split.is_sharded else None,
    )


def _conversions(
    model: nn.Module, state: dict[str, Tensor], options: dict[str, Any]
) -> list[Conversion]:
    if options.get("save_original_format", True):
        return checkpoints.saving(model, state)
    return [Conversion(n, (n,), lambda read, n=n: {n: read(n)}) for n in state]


def _file_size(tensors: dict[str, Tensor], ranks: int) -> int:
    """A file for every rank, no more, unless files would become very small or very large."""
    sizes = [tensor.nbytes for tensor in tensors.values()]
    even = math.ceil(sum(sizes) / ranks) + max(sizes)
    return min(max(even, _SMALL_FILE), _LARGE_FILE)


@torch.no_grad()
def _gather(
    model: nn.Module, plan: _Plan, files: list[tuple[str, list[str]]], rank: int
) -> dict[str, Tensor]:
    """This rank's part of a round, on the CPU."""
    state = model.state_dict()
    mine = set(files[rank][1]) if rank < len(files) else set[str]()
    every = {key for _, keys in files for key in keys}
    kept: dict[str, Tensor] = {}
    for conversion, keys in plan.made:
        if keys.isdisjoint(every):
            continue
        keep = not keys.isdisjoint(mine)
        sources = {name: _whole(state[name], keep) for name in conversion.sources}
        if keep:
            made = conversion.make(sources.pop)
            kept |= {key: made[key].contiguous() for key in keys & mine}
    return kept


def _whole(tensor: Tensor, keep: bool) -> Tensor:
    """The whole of a shard, on the CPU where it is kept; all ranks must call it."""
    if isinstance(tensor, DTensor):
        # Offloaded shards are gathered where the ranks can talk.
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return tensor.detach().cpu() if keep else tensor.new_empty(0)


def _write_configs(model: nn.Module, options: dict[str, Any]) -> None:
    """Everything but the tensors."""
    written = make_beside(Path(options["save_directory"]))
    checkpoints.class_save(model, options | {"state_dict": {}, "save_directory": written})


def _write_file(
    folder: Path, files: list[tuple[str, list[str]]], rank: int, tensors: dict[str, Tensor]
) -> None:
    if rank < len(files):
        name, keys = files[rank]
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        sync_file(folder / name)


def _finish(folder: Path, plan: _Plan, variant: str | None) -> None:
    if plan.index is not None:
        index = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (beside(folder) / index_name(variant)).write_text(index, encoding="utf-8")
    publish(folder, variant)


def _on_all(layout: Layout, action: Callable[[], None]) -> None:
    on_every_rank("save_pretrained", action, layout.ranks, layout.group)

"""Everything that moe_compile knows of how transformers and PEFT lay out checkpoints.

Private names used; they are those behind `from_pretrained` and `save_pretrained`, so without one of
them saving from several ranks, or `load_pretrained`, fails with its name, unless it says otherwise:

* `core_model_loading`: `WeightConverter`, `WeightRenaming`, `PrefixChange`, `rename_source_key`,
  `dot_natural_key`; and `conversion_mapping.get_model_conversion_mapping`: what checkpoints call
  and how they cut up the parameters of each model.
* `PreTrainedModel._weight_conversions`: those of the checkpoint that a model came from.
* `PreTrainedModel._keys_to_ignore_on_save`, `_adjust_missing_and_unexpected_keys`, and
  `modeling_utils.remove_tied_weights_from_state_dict`: keys that are not stored.
* `PreTrainedModel.initialize_weights` and the flag `_is_hf_initialized`: the values of buffers that
  are not stored.
* `PreTrainedModel._get_dtype_plan`: which tensors of a half-precision model stay in float32;
  without it a model on the meta device keeps those that it was built with, and a warning says so.
* `PreTrainedModel._hf_peft_config_loaded`: whether only adapters are saved.
"""

import contextlib
import copy
import functools
import logging
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moe_compile.adapters.transformers import base_model, is_pretrained

_LOG = logging.getLogger(__name__)

Read = Callable[[str], Tensor]
"""Gives a tensor by its name."""

_Rename = Callable[[str, list[Any], list[Any]], tuple[str, str | None]]


@dataclass(frozen=True)
class Conversion:
    """Tensors that are made of others, all at once.

    Attributes:
        target: the name of the first that is made; it stands for all of them.
        sources: what they are made of.
        make: makes them by name; it reads every source once.
    """

    target: str
    sources: tuple[str, ...]
    make: Callable[[Read], dict[str, Tensor]]


@dataclass(frozen=True)
class Loading:
    """How a checkpoint's tensors become a model's.

    Attributes:
        unexpected: keys of the checkpoint that the model has no place for.
        transforms: what transformers needs, to save in the same way again.
    """

    conversions: list[Conversion]
    unexpected: list[str]
    transforms: list[Any]


def settle_dtypes(model: nn.Module) -> None:
    """Gives a model on the meta device the dtypes that `from_pretrained` would give it.

    Building a model from its config knows no parameters that stay in float32.
    """
    if not is_pretrained(model) or not all(p.is_meta for p in model.parameters()):
        return
    base: Any = base_model(model)
    if not hasattr(base, "_get_dtype_plan"):
        _LOG.warning(
            "this release of transformers does not say which tensors of %s stay in float32: they "
            "keep the dtypes that it was built with on the meta device",
            type(base).__name__,
        )
        return
    for pattern, dtype in base._get_dtype_plan(base.dtype).items():
        for name, tensor in base.state_dict(keep_vars=True).items():
            if re.search(pattern.replace("*", ".*"), name) and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def loading(model: nn.Module, keys: Iterable[str]) -> Loading:
    """How the tensors of a checkpoint with these keys become those of a transformers model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    base: Any = model
    wanted = base.state_dict()

    def rename(key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        last: Any = (base.base_model_prefix, wanted)
        found = rename_source_key(key, renamings, converters, *last)
        if found[0] not in wanted and key in wanted:
            return rename_source_key(key, [], [], *last)
        return found

    with _own_classes(model):
        transforms = get_model_conversion_mapping(base)
    every = _conversions(base, keys, transforms, rename)
    return Loading(
        [c for c in every if c.target in wanted],
        [key for c in every if c.target not in wanted for key in c.sources],
        transforms,
    )


def saving(model: nn.Module, names: Iterable[str]) -> list[Conversion]:
    """How the tensors of a transformers model become those of a checkpoint."""
    from transformers.core_model_loading import rename_source_key

    return _conversions(
        model,
        names,
        _reverse_transforms(model),
        functools.partial(rename_source_key, reverse=True),
    )


def _reverse_transforms(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        with _own_classes(model):
            mapping = get_model_conversion_mapping(model, add_legacy=False)
        # Nobody knows whether a checkpoint that was never read had the prefix.
        transforms = [t for t in mapping if not isinstance(t, PrefixChange)]
    return [transform.reverse_transform() for transform in reversed(transforms)]


def _conversions(
    model: Any, names: Iterable[str], transforms: list[Any], rename: _Rename
) -> list[Conversion]:
    """Groups the names by what is made of them, in transformers' order."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename(name, renamings, converters)
        transform = WeightRenaming(name, target) if pattern is None else by_pattern[pattern]
        found.setdefault(target, (transform, []))[1].append((name, pattern or name))
    return [_conversion(model, target, *group) for target, group in found.items()]


def _conversion(
    model: Any, target: str, transform: Any, sources: list[tuple[str, str]]
) -> Conversion:
    def make(read: Read) -> dict[str, Tensor]:
        once = copy.deepcopy(transform)
        for name, pattern in sources:
            once.add_tensor(target, name, pattern, functools.partial(read, name))
        made = once.convert(target, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    return Conversion(target, tuple(name for name, _ in sources), make)


@contextlib.contextmanager
def _own_classes(model: nn.Module) -> Generator[None]:
    """The classes that FSDP2 made subclasses of: transformers takes those for a user's own code."""
    wrapped = [(m, type(m)) for m in model.modules() if isinstance(m, FSDPModule)]
    for module, kind in wrapped:
        module.__class__ = kind.__mro__[kind._orig_cls_mro_index]
    try:
        yield
    finally:
        for module, kind in wrapped:
            module.__class__ = kind


def ignore_known(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Without the keys that the model says may be missing from a checkpoint, or superfluous."""
    keys = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(keys)
    return keys.missing_keys, keys.unexpected_keys


def initialize_rest(model: Any, loaded: Iterable[Tensor]) -> None:
    """Gives what is in no checkpoint its values, as `from_pretrained` does: buffers, mostly."""
    for tensor in loaded:
        vars(tensor)["_is_hf_initialized"] = True
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    with _own_classes(model):
        model.initialize_weights()


def finish_loading(model: Any, transforms: list[Any], folder: Path) -> None:
    """Remembers what `save_pretrained` and `generate` would know after `from_pretrained`."""
    from transformers import GenerationConfig

    model._weight_conversions = [t for t in transforms if t.was_used()]
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def stored_state(model: Any) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` stores, as meta tensors, under the model's own names."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict().items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    return remove_tied_weights_from_state_dict(state, model)


def class_save(model: Any, options: dict[str, Any]) -> None:
    """The class's own `save_pretrained`."""
    with _own_classes(model):
        type(model).save_pretrained(model, **options)


def adapter_names(
    model: Any, state: dict[str, Tensor], options: dict[str, Any]
) -> list[str] | None:
    """The names of the adapters' tensors; None where the whole model is saved, not its adapters."""
    adapters = adapter_states(model, state, options)
    if adapters is None:
        return None
    saved = {id(tensor) for part in adapters.values() for tensor in part.values()}
    return [name for name, tensor in state.items() if id(tensor) in saved]


def adapter_states(
    model: Any, state: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, dict[str, Tensor]] | None:
    """What is saved of each adapter, under the names in its file, by the folder that holds it.

    None where the whole model is saved, not its adapters.
    """
    if is_wrapper(model):
        from peft import get_peft_model_state_dict

        wanted = options.get("selected_adapters") or list(model.peft_config)
        embeddings = options.get("save_embedding_layers", "auto")
        return {
            "" if name == "default" else name: get_peft_model_state_dict(
                model, dict(state), name, save_embedding_layers=embeddings
            )
            for name in wanted
        }
    if _has_own_adapters(model):
        own = model.get_adapter_state_dict(state_dict=state)
        return {"": {f"base_model.model.{name}": tensor for name, tensor in own.items()}}
    return None


def has_adapters(model: nn.Module) -> bool:
    """Whether `save_pretrained` saves adapters, not the model."""
    return is_pretrained(model) and (is_wrapper(model) or _has_own_adapters(model))


def _has_own_adapters(model: nn.Module) -> bool:
    """Whether transformers has put PEFT's adapters into the model, with no wrapper around it."""
    return getattr(model, "_hf_peft_config_loaded", False)


def is_wrapper(model: nn.Module) -> bool:
    """Whether the model is PEFT's, around one of transformers."""
    return base_model(model) is not model

"""Every mixture-of-experts family of transformers, and how its tiny model is made."""

import contextlib
import importlib
import inspect
import re
from collections.abc import Generator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.zoo.exceptions import EXCEPTIONS, FULL_SIZE
from tests.zoo.shrink import Fields, shrunk, sub_configs

_TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "TOKEN_CLASSIFICATION",
)
"""In this order: the first that a model type has is the whole model, with a loss."""

_EXPERTS = re.compile(r"expert|(^|_)moe(_|$)")


@dataclass(frozen=True)
class Entry:
    """A family.

    Attributes:
        name: what tests call it.
        model_type: its key in CONFIG_MAPPING.
        config: the class of its configuration, where it is not that of the model type.
        model: the class of its model, where no task of the model type names it.
        options: fields that make it a variant.
        broken: what its training step raises in the release that it was written for.
    """

    name: str
    model_type: str
    config: str = ""
    model: str = ""
    options: Fields = field(default_factory=dict[str, Any], hash=False)
    broken: str = ""


_TYPES = (
    "afmoe",
    "aria",
    "aria_text",
    "axk1",
    "axk2",
    "cohere2_moe",
    "dbrx",
    "deepseek_ocr2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "diffusion_gemma",
    "dots1",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "exaone_moe",
    "flex_olmo",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling_mm_model",
    "inkling_text",
    "jamba",
    "jetmoe",
    "kimi_k25",
    "kimi_linear",
    "laguna",
    "lfm2_moe",
    "llama4",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl",
    "mistral4",
    "mixtral",
    "nemotron_h",
    "nllb-moe",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "qwen4_exp",
    "solar_open",
    "step3p7",
    "switch_transformers",
    "zaya",
)
_OTHERS = (
    # The layer adds the pair that its experts return, as if it were a tensor.
    Entry("doge", "doge", broken="must be Tensor, not tuple"),
    Entry("nemotron_h_latent", "nemotron_h", options={"moe_latent_size": 16}),
    Entry(
        "qwen3_omni_moe_talker",
        "qwen3_omni_moe",
        config="Qwen3OmniMoeTalkerConfig",
        model="Qwen3OmniMoeTalkerForConditionalGeneration",
    ),
    Entry("vitpose_backbone", "vitpose_backbone", model="VitPoseBackbone"),
)

LOOK_ALIKES = frozenset({"bamba", "gemma3n", "gemma4_unified", "vitpose"})
"""Not mixtures of experts, whatever fields they have: vitpose has experts only in its backbone."""


def entries() -> tuple[Entry, ...]:
    return (*(Entry(name, name) for name in _TYPES), *_OTHERS)


def entry_of(name: str) -> Entry:
    return next(entry for entry in entries() if entry.name == name)


def config_of(entry: Entry, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration; those of sub-configurations are dictionaries under their names."""
    changes = _merged(_known(entry), entry.options)
    return shrunk(_config_class(entry)(), _merged(changes, overrides))


def moe_types() -> set[str]:
    """The model types whose configurations, or their sub-configurations, have fields of experts.

    From the classes alone: a few configurations cannot be made without a download.
    """
    return {name for name in CONFIG_MAPPING if _has_experts(CONFIG_MAPPING[name])}


def _has_experts(config: type[PreTrainedConfig]) -> bool:
    names = (field.name for field in fields(config))
    subs = (sub for sub in config.sub_configs.values() if is_dataclass(sub))
    return any(_EXPERTS.search(name) for name in names) or any(map(_has_experts, subs))


def types_of(config: PreTrainedConfig) -> set[str]:
    """Its model type and those of its sub-configurations."""
    below = (types_of(sub) for sub in sub_configs(config).values())
    return {config.model_type}.union(*below)


def build(
    entry: Entry, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model in training mode, with every parameter away from 0 and 1."""
    torch.manual_seed(seed)
    with _nan_where_uninitialized():
        model = _model_class(entry)._from_config(config_of(entry, **overrides), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_().add_(torch.randn_like(parameter) * 0.05)
        for buffer in _zero_buffers(model):
            buffer.add_(torch.randn_like(buffer) * 0.05)
    return model.train()


def full_size(entry: Entry) -> PreTrainedModel:
    """A model in bfloat16 of the default configuration of its class, on the current device.

    Where the defaults leave out a field that the model needs, it is that of the tiny model.
    """
    options = _merged(FULL_SIZE.get(entry.name, {}), entry.options)
    try:
        return _of_defaults(entry, options)
    except (AttributeError, TypeError):  # such as a field that is None
        lacking = _lacking(_config_class(entry)(), _known(entry))
        return _of_defaults(entry, _merged(lacking, options))


def _of_defaults(entry: Entry, options: Fields) -> PreTrainedModel:
    config = _config_class(entry)(**options)
    return _model_class(entry)._from_config(config, dtype=torch.bfloat16).train()


def _known(entry: Entry) -> Fields:
    """What its configuration needs beside the rules by which it is made tiny."""
    return EXCEPTIONS.get(entry.name, EXCEPTIONS.get(entry.model_type, {}))


def _lacking(config: PreTrainedConfig, known: Fields) -> Fields:
    """Of the fields, those that the model needs and its configuration says nothing of."""
    lacking = {n: value for n, value in known.items() if getattr(config, n, None) is None}
    for name, sub in sub_configs(config).items():
        below = _lacking(sub, known.get(name, {}))
        lacking |= {name: below} if below else {}
    return lacking


@contextlib.contextmanager
def _nan_where_uninitialized() -> Generator[None]:
    """One family forgets to initialize its experts: what they hold would differ in every run."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def arguments_of(entry: Entry) -> set[str]:
    """Of the model's forward."""
    return set(inspect.signature(_model_class(entry).forward).parameters)


def _zero_buffers(model: nn.Module) -> list[Tensor]:
    """Such as the correction bias of a router, which hides mistakes while it is zero."""
    floating = [b for b in model.buffers() if b.is_floating_point() and b.numel() > 0]
    return [buffer for buffer in floating if not buffer.any()]


def _merged(left: Fields, right: Fields) -> Fields:
    """`right` over `left`, dictionary by dictionary."""
    both = {
        key: _merged(left[key], right[key])
        for key in left.keys() & right.keys()
        if isinstance(left[key], dict) and isinstance(right[key], dict)
    }
    return left | right | both


def _config_class(entry: Entry) -> type[PreTrainedConfig]:
    kind = CONFIG_MAPPING[entry.model_type]
    return getattr(importlib.import_module(kind.__module__), entry.config or kind.__name__)


def _model_class(entry: Entry) -> Any:
    config = CONFIG_MAPPING[entry.model_type]
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    return getattr(module, entry.model or _auto_name(entry.model_type))


def _auto_name(model_type: str) -> str:
    maps = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in _TASKS]
    return next(names[model_type] for names in maps if model_type in names)

"""Every mixture-of-experts family of transformers, and how its tiny model is made."""

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.zoo.exceptions import EXCEPTIONS
from tests.zoo.shrink import Fields, shrunk

_TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "TOKEN_CLASSIFICATION",
)
"""In this order: the first that a model type has is the whole model, with a loss."""


@dataclass(frozen=True)
class Entry:
    """A family. Its configuration and model are those of `model_type`, unless they are named."""

    name: str
    model_type: str
    config: str = ""
    model: str = ""
    options: Fields = field(default_factory=dict[str, Any], hash=False)


_TYPES = """
afmoe aria aria_text axk1 axk2 cohere2_moe dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 diffusion_gemma doge dots1 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo gemma4
gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa
granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling_mm_model inkling_text jamba
jetmoe kimi_k25 kimi_linear laguna lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash
minimax minimax_m2 minimax_m3_vl mistral4 mixtral nemotron_h nllb-moe olmoe openai_privacy_filter
phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker
qwen3_vl_moe qwen4_exp solar_open step3p7 switch_transformers zaya
""".split()

_OTHERS = (
    Entry("nemotron_h_latent", "nemotron_h", options={"moe_latent_size": 16}),
    Entry(
        "qwen3_omni_moe_talker",
        "qwen3_omni_moe",
        config="Qwen3OmniMoeTalkerConfig",
        model="Qwen3OmniMoeTalkerForConditionalGeneration",
    ),
    Entry("vitpose_backbone", "vitpose_backbone", model="VitPoseBackbone"),
)


def entries() -> tuple[Entry, ...]:
    return (*(Entry(name, name) for name in _TYPES), *_OTHERS)


def entry_of(name: str) -> Entry:
    return next(entry for entry in entries() if entry.name == name)


def config_of(entry: Entry, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration; those of sub-configurations are dictionaries under their names."""
    changes = _merged(EXCEPTIONS.get(entry.name, EXCEPTIONS.get(entry.model_type, {})), entry.options)
    return shrunk(_config_class(entry)(), _merged(changes, overrides))


def build(
    entry: Entry, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model in training mode, with every parameter away from 0 and 1."""
    torch.manual_seed(seed)
    model = _model_class(entry)._from_config(config_of(entry, **overrides), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for buffer in _zero_buffers(model):
            buffer.add_(torch.randn_like(buffer) * 0.05)
    return model.train()


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

"""Tiny random models of the families that the tests use. Only tests name models."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _config(
    kind: Callable[..., PreTrainedConfig], sizes: dict[str, Any], options: dict[str, Any]
) -> PreTrainedConfig:
    return kind(**_COMMON | sizes | options)


def qwen3_moe(**options: Any) -> PreTrainedConfig:
    """Dense first layer, then experts; query and key norms."""
    return _config(
        Qwen3MoeConfig,
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_experts": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
        options,
    )


def mixtral(**options: Any) -> PreTrainedConfig:
    """Softmax before top-k, grouped heads."""
    return _config(
        MixtralConfig,
        {"intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4},
        options,
    )


def olmoe(**options: Any) -> PreTrainedConfig:
    """Norms over all heads together."""
    return _config(
        OlmoeConfig, {"intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 8}, options
    )


def deepseek_v3(**options: Any) -> PreTrainedConfig:
    """Latent attention, shared expert, grouped sigmoid routing with a correction bias."""
    return _config(
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
        options,
    )


def gpt_oss(**options: Any) -> PreTrainedConfig:
    """Interleaved gate and up, biases, clamped activation, sinks, sliding and full attention."""
    return _config(
        GptOssConfig,
        {
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        options,
    )


def nemotron_h(**options: Any) -> PreTrainedConfig:
    """Mamba2 hybrid with squared-ReLU experts that have no gate."""
    return _config(
        NemotronHConfig,
        {
            "intermediate_size": 48,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 8,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        options,
    )


FAMILIES = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "nemotron_h": nemotron_h,
    "nemotron_h_latent": lambda **options: nemotron_h(moe_latent_size=16, **options),
}


def build(
    family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A random model of the family, in training mode, with every parameter away from 0 and 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**options), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()

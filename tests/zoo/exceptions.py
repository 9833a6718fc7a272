"""What the rules cannot know of a family: its own constraints, and what its defaults leave off."""

from typing import Any

Fields = dict[str, Any]

_GEMMA4_TEXT: Fields = {  # by default it has no experts
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
_QWEN3_VISION: Fields = {"deepstack_visual_indexes": [0]}  # layers of the tower
_DSA: Fields = {"index_head_dim": 16}  # it holds the rotated part beside another

EXCEPTIONS: dict[str, Fields] = {
    "deepseek_ocr2": {
        "text_config": {  # by default it names no kinds of layers and no top-k
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "group_limited_greedy",
        }
    },
    # The defaults give no top-k, and choose among all experts.
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "doge": {  # by default it has no experts; 4 x 4 product keys
        "is_moe": True,
        "num_experts": 16,
        "keep_window_size": 6,
    },
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4": {"text_config": _GEMMA4_TEXT},
    "diffusion_gemma": {"text_config": _GEMMA4_TEXT},
    "glm5_next": {"text_config": {"index_kpool": 2}},  # divides the indexer's top-k
    "hunyuan_v1_moe": {"head_dim": 8},  # by default it has none
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 3, "num_hidden_layers": 4},
    "laguna": {"num_attention_heads_per_layer": None},  # those of full-size layers
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "qwen3_omni_moe_thinker": {"vision_config": _QWEN3_VISION},
    "qwen3_vl_moe": {"vision_config": _QWEN3_VISION},
    "switch_transformers": {"decoder_start_token_id": 0},  # by default it has none
    "zaya": {"num_experts_per_tok": 1},  # the only top-k that it takes
}

"""What the rules cannot know of a family: its own constraints, and what its defaults leave off."""

from typing import Any

Fields = dict[str, Any]

_GEMMA4_TEXT: Fields = {  # by default it has no experts
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "global_head_dim": 32,  # no field: only an argument
}
_GROUPS_V2: Fields = {  # by default it has no top-k, and chooses among all experts
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
}
_QWEN3_VISION: Fields = {"deepstack_visual_indexes": [0]}  # layers of the tower

EXCEPTIONS: dict[str, Fields] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},  # of an image of 4 by 4 patches
    "axk2": {"n_group": 2, "topk_group": 1},  # by default it chooses among all experts
    "cohere2_moe": {"num_shared_experts": 1},  # by default it has none
    "dbrx": {  # fields that the model needs and the defaults leave out
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    },
    "deepseek_ocr2": {
        "text_config": _GROUPS_V2
        | {  # by default it names no kinds of layers
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "vision_config": {
            "sam_config": {"downsample_channels": [16, 32], "global_attn_indexes": [1]}
        },
    },
    "deepseek_v2": _GROUPS_V2,
    "deepseek_v4": {  # so short that a sequence of a test has compressed tokens
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "diffusion_gemma": {
        "canvas_length": 8,
        "text_config": _GEMMA4_TEXT,
        "vision_config": {"model_type": "gemma4_vision"},  # none by default, and no model without
    },
    "doge": {  # by default it has no experts; 4 x 4 product keys
        "is_moe": True,
        "num_experts": 16,
        "keep_window_size": 6,
    },
    # By default it has no experts.
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 8]}},  # of text, of images
    "gemma4": {"text_config": _GEMMA4_TEXT},
    "gemma4_text": _GEMMA4_TEXT,
    "glm5_next": {"text_config": {"index_kpool": 2}},  # divides the indexer's top-k
    "granitemoe_swa": {"shared_intermediate_size": 16},  # by default it has no shared expert
    "granitemoehybrid": {  # by default it has no attention
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoeshared": {"shared_intermediate_size": 16},  # the same
    "hunyuan_v1_moe": {"head_dim": 8},  # by default it has none
    # Of its tower, every factor of a patch (2 by 2 pixels, 2 frames) is a layer.
    "inkling_mm_model": {"vision_config": {"patch_size": 2, "num_hidden_layers": 3}},
    # Its kinds of layers follow from periods.
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 3, "num_hidden_layers": 4},
    "laguna": {
        "num_attention_heads_per_layer": [4, 8, 4],  # the defaults are those of full-size layers
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "moe_router_logit_softcapping": 5.0,  # off by default
    },
    "lfm2_moe": {  # by default it names no kinds of layers
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
    },
    "llama4": {"vision_config": {"intermediate_size": 128}},  # as wide as four pixels, shuffled
    "longcat_flash": {"zero_expert_num": 4, "num_hidden_layers": 4},  # two attentions a layer
    # By default it has full attention alone.
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl": {
        "text_config": {  # by default every layer has experts and full attention
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rotary_dim": 8,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        }
    },
    "nemotron_h": {  # by default it has one layer of experts
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "num_hidden_layers": 5,
    },
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},  # one of two layers
    "openai_privacy_filter": {"num_labels": 128},  # the ids of the text are its labels
    "qwen3_omni_moe_talker": {  # fields that the model reads and the configuration has not
        "vocab_size": 128,
        "spatial_merge_size": 2,
        "text_config": {"shared_expert_intermediate_size": 16},
    },
    "qwen3_omni_moe_thinker": {"vision_config": _QWEN3_VISION},
    "qwen3_vl_moe": {"vision_config": _QWEN3_VISION},
    "qwen4_exp": {
        "text_config": {  # the indexer and the n-gram embedding are off by default
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
            "eos_token_id": 2,
        }
    },
    "step3p7": {
        "text_config": {  # by default every layer has full attention and no limit
            "num_hidden_layers": 3,
            "rope_parameters": None,  # made from the types of the layers
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 6,
            "swiglu_limits": [None, None, 7.0],
            "swiglu_limits_shared": [None, None, 7.0],
        }
    },
    "switch_transformers": {
        "decoder_start_token_id": 0,  # by default it has none
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "vitpose_backbone": {"image_size": [32, 32], "num_experts": 4, "part_features": 8},
    "zaya": {"num_experts_per_tok": 1},  # the only top-k that it takes
}

FULL_SIZE: dict[str, Fields] = {
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", *["sparse"] * 31], "num_experts_per_tok": 6}
    },
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4v_moe": {"text_config": {"head_dim": 128}},  # as its sections of rotary want
    "qwen3_omni_moe_thinker": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 16,
        }
    },
    "step3p7": {
        "text_config": {
            "rope_parameters": None,
            "layer_types": ["full_attention", *["sliding_attention"] * 3] * 11 + ["full_attention"],
            "mlp_layer_types": [*["dense"] * 3, *["sparse"] * 42],
            "sliding_window": 512,
        }
    },
}
"""Of a model of the default configuration, where neither that nor the tiny one will do."""

"""Any configuration at test size: rules by the names of fields, through every sub-configuration."""

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

Fields = dict[str, Any]

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 32, 4, 16, 128, 64
FIRST_SPECIAL_ID = 104
"""Ids from here on are those of images, audio and the like; below it, text."""

_SIZES: dict[str, int] = {
    r"vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"hidden_size|d_model|out_hidden_size|text_hidden_size|projection_dim": HIDDEN,
    r"projector_(in|out)put_dim|projector_hidden_size|projection_hidden_size|output_dim": HIDDEN,
    r"thinker_hidden_size|vision_output_dim": HIDDEN,
    r"merged_hidden_size": 4 * HIDDEN,
    r"hidden_size_per_layer_input|index_head_dim|d_rel|router_hidden_size": 8,
    r"output_channels|downsample_hidden_size|n_mel_bins|num_mel_bins|mel_vocab_size": 16,
    r"patch_size|pos_emb_(height|width)|window_size": 4,
    r"image_size|num_position_embeddings|rel_extent": 16,
    r"position_embedding_size": 64,
    r"(dense_|projection_)?intermediate_size(_mlp)?|ffn_hidden_size|d_ff|(en|de)coder_ffn_dim": 48,
    r"(moe_|shared_|moe_shared_expert_|shared_expert_)intermediate_size|mlp_dim": 16,
    r"expert_ffn_hidden_size|share_expert_dim|moe_latent_size": 16,
    r"(num_|swa_num_|encoder_|decoder_|num_sliding_)attention_heads|n_heads|num_heads": HEADS,
    r"(swa_|global_)?head_dim|d_kv|kv_channels": HEAD_DIM,
    r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim": 8,
    r"q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank": 16,
    r"n_group|num_expert_group|index_n_heads|o_groups": 2,
    r"topk_group": 1,
    r"(moe_)?num_(local_)?experts|n_routed_experts|moe_num_experts": 8,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts": 2,
    r"(n|num|moe_num)_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"num_nextn_predict_layers|num_mtp_layers": 0,
    r"max_position_embeddings|max_seq_len|max_source_positions": POSITIONS,
    r"sliding_window(_size)?|attention_chunk_size": 6,
    r"index_topk": 4,
    r"mamba_chunk_size|chunk_size|block_size": 8,
    r"linear_(num_)?(key_|value_)?head_dim|mamba_head_dim|mamba_d_head|ssm_state_size": 8,
    r"linear_num_(value_)?heads|mamba_num_heads": 4,
    r"linear_num_key_heads|n_groups|mamba_n_groups": 2,
    r"mamba_n_heads|mamba_d_state|mamba_dt_rank": 8,
    r"expert_capacity": 64,
}
_DEPTHS = re.compile(r"num_hidden_layers|num_layers|n_layers|depth|(en|de)coder_layers")
_NO_CHANCE = re.compile(r".*(dropout|pdrop|jitter|layerdrop|drop_path).*")
_KEY_VALUE_HEADS = re.compile(r"(swa_)?num_key_value_heads|kv_n_heads")
_SPECIAL_ID = re.compile(r".*_token_(id|index)")
_DENSE_FIRST = {"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"}
_TEXT_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def shrunk(config: PreTrainedConfig, changes: Fields) -> PreTrainedConfig:
    """Of the same class, from the defaults of its class, with sizes for a test.

    `changes` go last; those of a sub-configuration are a dictionary under its name.
    """
    return type(config)(**_shrunk_fields(config, changes))


def _shrunk_fields(config: PreTrainedConfig, changes: Fields) -> Fields:
    fields = _depth(config) | _small(config) | _special_ids(config) | _rope(config) | changes
    for name, sub in _sub_configs(config, changes).items():
        named = {"model_type": sub.model_type} if sub.model_type else {}
        fields[name] = named | _shrunk_fields(sub, changes.get(name, {}))
    return fields


def sub_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {k: v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}


def _sub_configs(config: PreTrainedConfig, changes: Fields) -> dict[str, PreTrainedConfig]:
    """Those of the defaults, and those that `changes` name a model type for."""
    named = {k: v["model_type"] for k, v in changes.items() if "model_type" in _fields(v)}
    return sub_configs(config) | {name: CONFIG_MAPPING[kind]() for name, kind in named.items()}


def _fields(value: Any) -> Fields:
    return value if isinstance(value, dict) else {}


def _declared(config: PreTrainedConfig) -> Fields:
    """The fields that its class adds to those of every configuration, and their values."""
    own = {field.name for field in dataclasses.fields(config)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    stored = {name: config.attribute_map.get(name, name) for name in own}
    return {name: vars(config).get(stored[name]) for name in sorted(own)}


def _small(config: PreTrainedConfig) -> Fields:
    found: Fields = {}
    for name, value in _declared(config).items():
        if isinstance(value, float) and _NO_CHANCE.fullmatch(name):
            found[name] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            size = _key_value_heads(config, name, value) or _size(name)
            found |= {name: size} if size else {}
    if _same(config, "head_dim", "qk_rope_head_dim"):
        found["head_dim"] = found["qk_rope_head_dim"]
    return found


def _size(name: str) -> int | None:
    return next((size for rule, size in _SIZES.items() if re.fullmatch(rule, name)), None)


def _key_value_heads(config: PreTrainedConfig, name: str, value: int) -> int | None:
    """One, as many as there are queries, or two: what the defaults say."""
    if not _KEY_VALUE_HEADS.fullmatch(name):
        return None
    if value == 1:
        return 1
    return HEADS if _same(config, name, "num_attention_heads") else HEADS // 2


def _same(config: PreTrainedConfig, left: str, right: str) -> bool:
    """Whether the defaults give both fields one positive size."""
    return bool(vars(config).get(left)) and vars(config).get(left) == vars(config).get(right)


def _special_ids(config: PreTrainedConfig) -> Fields:
    """Ids inside the vocabulary, no two the same, above those of text."""
    names = [n for n, v in _declared(config).items() if _SPECIAL_ID.fullmatch(n) and v is not None]
    special = [name for name in names if name not in _TEXT_IDS]
    ids = {name: FIRST_SPECIAL_ID + place for place, name in enumerate(special)}
    return {name: _TEXT_IDS.get(name, ids.get(name)) for name in names}


def _depth(config: PreTrainedConfig) -> Fields:
    """The fewest layers that show every kind of layer of the defaults."""
    declared = _declared(config)
    depths = {n: v for n, v in declared.items() if _DEPTHS.fullmatch(n) and isinstance(v, int)}
    depth = max(depths.values(), default=0)
    lists = {n: v for n, v in declared.items() if isinstance(v, list) and len(v) == depth}
    lists = {n: v for n, v in lists.items() if len(set(v)) <= 4}
    if not lists:
        return dict.fromkeys(depths, 3 if _DENSE_FIRST & declared.keys() else 2)
    chosen = _every_kind(list(lists.values()))
    kept = {name: [values[at] for at in chosen] for name, values in lists.items()}
    return dict.fromkeys(depths, len(chosen)) | kept


def _every_kind(lists: list[list[Any]]) -> list[int]:
    """The first layer with each value; with the last one, where its kind comes only once."""
    chosen = {values.index(value) for values in lists for value in values}
    last = len(lists[0]) - 1
    once = any([values[at] for at in chosen].count(values[last]) < 2 for values in lists)
    return sorted(chosen | {last} if once else chosen)


def _rope(config: PreTrainedConfig) -> Fields:
    """As much rotation as a small head has room for, in sections that add up to it."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return {}
    found = _partial(parameters)
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        head = HEAD_DIM if vars(config).get("head_dim") else HIDDEN // HEADS
        half = int(head * found.get("partial_rotary_factor", 1.0)) // 2
        found["mrope_section"] = [half // 4, half // 4, half - 2 * (half // 4)]
    return {"rope_parameters": found}


def _partial(parameters: Fields) -> Fields:
    found = {k: _partial(v) if isinstance(v, dict) else v for k, v in parameters.items()}
    if "partial_rotary_factor" in found:
        found["partial_rotary_factor"] = max(0.5, parameters["partial_rotary_factor"])
    if "original_max_position_embeddings" in found:
        found |= {"factor": 4.0, "original_max_position_embeddings": POSITIONS // 4}
    return found

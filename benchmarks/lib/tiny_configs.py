"""Configs of tiny models for every causal language model of transformers.

Widths and counts go by the names of a config's entries; `OWN` has what single models need beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD, VOCABULARY, WINDOW = 6, 32, 48, 4, 2, 8, 96, 8
# values by the names of entries that many configs have
NAMED: tuple[tuple[int | float, str], ...] = (
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers num_blocks depth",
    ),
    (
        WIDTH,
        "hidden_size n_embd d_model emb_dim embedding_dim word_embed_proj_dim embedding_size "
        "input_embedding_size output_embedding_size attention_hidden_size lru_width projection_dim",
    ),
    (
        FFN,
        "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dff d_inner dim_ff "
        "feed_forward_size intermediate_size_mlp ffn_hidden_size shared_intermediate_size "
        "block_ff_dim dense_intermediate_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads num_query_groups "
        "num_experts num_local_experts n_routed_experts moe_num_experts",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads o_groups",
    ),
    (
        HEAD,
        "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim swa_head_dim d_head dim_head "
        "kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
        "attention_head_size global_head_dim hidden_size_per_layer_input laurel_rank adapter_rank "
        "state_size mamba_d_state ssm_state_size mamba_num_heads mamba_n_heads mamba_d_head "
        "mamba_head_dim index_topk",
    ),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        WINDOW,
        "sliding_window attention_window_size local_attention attention_chunk_size window_size "
        "sliding_window_size chunk_size mamba_chunk_size block_size",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    (16, "q_lora_rank kv_lora_rank o_lora_rank mamba_dt_rank time_step_rank"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "mamba_n_groups mamba_ngroups n_groups bos_token_id num_expert_group",
    ),
    (2, "eos_token_id decoder_start_token_id first_k_dense_replace num_dense_layers"),
    (0, "pad_token_id num_nextn_predict_layers"),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "original_max_position_embeddings max_target_positions",
    ),
    (8, "image_size rotary_dim"),
    (4, "patch_size"),
)
GENERIC = {name: value for value, names in NAMED for name in names.split()}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ADAPTED = {"adapter_out_dim": WIDTH}
QWEN4 = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
QWEN4 |= {"indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8, "hc_count": 2}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 3, "attention_head_dim": 16}
ZAMBA |= {"attention_hidden_size": 2 * WIDTH}
GEMMA4 = {"hidden_size_per_layer_input": 0, "global_head_dim": 16}
ALTERNATING = {"layer_types": ["linear_attention", "full_attention"] * 3}
DOTS3 = {"num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_head_dim": 16}
DOTS3 |= {"swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16}
DOTS3 |= {"swa_qk_nope_head_dim": HEAD, "swa_v_head_dim": HEAD}
MIXED = ["linear_attention", "full_attention"]
SHARED = {"num_kv_shared_layers": 2}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "cohere2": {"rotary_pct": 1.0},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 2, "n_output_layers": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"pyramid_num_routed": [-1] * 3 + [4] * 3, **ADAPTED}
        | {"adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32, **ADAPTED},
    },
    "dots3_note_text": DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 95, "<|extra_200|>": 94}},
    "falcon_h1": {"mamba_d_ssm": 64, "head_dim": 8},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 3} | SHARED,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt2": {"n_ctx": 64},
    "gpt-sw3": {"n_ctx": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "gpt_neox": {"rotary_pct": 0.5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "mlp", *MIXED]},
    "qwen3_5": {"text_config": ALTERNATING},
    "qwen3_5_text": ALTERNATING,
    "qwen3_5_moe": {"text_config": ALTERNATING},
    "qwen3_5_moe_text": ALTERNATING,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh"] * 3,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": ZAMBA | {"mamba_dt_rank": 8},
    "zamba2": ZAMBA | {"n_mamba_heads": 8, "mamba_headdim": 8, "hybrid_layer_ids": [1, 3, 5]},
}


# kinds beside those of transformers' list: a model_type with other entries
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, inputs of each layer": ("gemma4_text", {}),
    "gemma3n_text, nothing shared": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "rwkv, not rescaled": ("rwkv", {"rescale_every": 0}),
}


def config_of(kind: str) -> Any:
    """A tiny config of a ``model_type``, or of one of `VARIANTS`."""
    from transformers import CONFIG_MAPPING

    name, own = VARIANTS.get(kind, (kind, OWN.get(kind, {})))
    return tiny(CONFIG_MAPPING[name], own)


def tiny(cls: Any, own: Mapping[str, Any]) -> Any:
    """A config of the class with small values, and those of configs inside it."""
    try:
        default = cls()
    except Exception:  # its defaults contradict each other
        default = cls(**own)
    values = {name: GENERIC[name] for name in vars(default) if name in GENERIC}
    values |= {"is_decoder": True} if hasattr(default, "is_decoder") else {}
    if "kv_lora_rank" in vars(default):  # a key a head, from the same latent state
        values["num_key_value_heads"] = HEADS
    inside = {name: getattr(default, name, None) for name in getattr(cls, "sub_configs", {})}
    for name, config in inside.items():
        if config is not None:
            values[name] = tiny(type(config), own.get(name, {})).to_dict()
    inner = {name: value for name, value in own.items() if name not in inside}
    return cls(**{**values, **inner})

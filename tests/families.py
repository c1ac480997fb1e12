"""Tiny random models of many families of transformers."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 6
PLAIN = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", PLAIN),
    "llama, tied": ("llama", {**PLAIN, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**PLAIN, "sliding_window": 8}),
    "mixtral": ("mixtral", {**PLAIN, "num_local_experts": 4}),
    "qwen2": ("qwen2", PLAIN),
    "qwen2, sliding": (
        "qwen2",
        {**PLAIN, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", {**PLAIN, "head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**PLAIN, **MOE, "head_dim": 8, "mlp_only_layers": [0, 3]}),
    "gemma2": ("gemma2", {**PLAIN, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**PLAIN, "head_dim": 8, "sliding_window": 8}),
    "phi": ("phi", {**PLAIN, "num_key_value_heads": 4}),
    "phi3": ("phi3", PLAIN),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}),
    "gpt_neox": ("gpt_neox", {**OLD, "intermediate_size": 48}),
    "opt": ("opt", {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", OLD),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
    "olmo2": ("olmo2", PLAIN),
    "smollm3": ("smollm3", PLAIN),
    "starcoder2": ("starcoder2", PLAIN),
    "stablelm": ("stablelm", PLAIN),
    "cohere": ("cohere", PLAIN),
    "granite": ("granite", PLAIN),
    "mamba": ("mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": LAYERS}),
}


def make(family: str, seed: int = 0):
    """A model of the family in evaluation mode, its weights drawn from N(0, 0.2)."""
    kind, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **arguments)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "conv" not in name and "A_log" not in name:
                weight.normal_(std=0.2)
    return model

"""Tiny random models of transformers as GGUF files of their own architecture."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from conftest import BYTE_VOCAB
from transformers import AutoConfig, AutoModelForCausalLM

from llama.formats.hf import permute_rows

LAYERS = 8
COMMON = {"vocab_size": BYTE_VOCAB, "hidden_size": 64, "intermediate_size": 96}
COMMON |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 128}
COMMON |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
HEAD = {"head_dim": 16}
SLIDING = {**HEAD, "sliding_window": 8, "query_pre_attn_scalar": 16}
WINDOW = {"sliding_window": 8}
OSS = {**HEAD, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
OSS |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}
# GGUF's architecture, transformers' type, what the config has beside `COMMON`, keys of the file
FAMILIES: dict[str, tuple[str, str, dict, dict]] = {
    "llama": ("llama", "llama", {}, {"rope.dimension_count": 16}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen3", HEAD, {}),
    "gemma2": ("gemma2", "gemma2", SLIDING, {"attention.sliding_window": 8}),
    "gemma3": ("gemma3", "gemma3_text", SLIDING, {"attention.sliding_window": 8}),
    "phi3": ("phi3", "phi3", {}, {"rope.dimension_count": 16}),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "granite": ("granite", "granite", {}, {"rope.dimension_count": 16}),
    "starcoder2": ("starcoder2", "starcoder2", {}, {}),
    "cohere2": ("cohere2", "cohere2", WINDOW, {"attention.sliding_window": 8}),
    "olmo3": ("olmo2", "olmo3", WINDOW, {"attention.sliding_window": 8}),
    "gpt-oss": ("gpt-oss", "gpt_oss", OSS, {"attention.sliding_window": 8, **EXPERTS}),
}


def make(family: str, seed: int = 0, **changes: object):
    """A random model of transformers whose layers do something."""
    _, kind, own, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**COMMON, **own, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.copy_(torch.randn_like(weight) * (0.5 if "embed" in name else 0.15))
    return model


def write_model(path: Path, family: str, model, **keys: object) -> Path:
    """Writes a model of transformers as GGUF in float32, with a tokenizer of letters."""
    arch, config = FAMILIES[family][0], model.config
    divisors = keys.pop("rope_freqs", None)  # of the rotary frequencies
    # tensors in each of several files; 0 is one file
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=keys.pop("split", 0))
    add_keys(writer, arch, {**_keys(arch, config), **FAMILIES[family][3], **keys})
    blocks = config.num_hidden_layers
    number = next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == arch)
    names = gguf.get_tensor_name_map(number, blocks)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for part, value in _parts(name, weight):
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert found is not None, part
            writer.add_tensor(found, _layout(arch, found, value, config).numpy())
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    write_tokenizer(writer)
    return finished(writer, path)


def finished(writer, path: Path) -> Path:
    """Writes all that a writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_keys(writer, arch: str, keys: dict[str, object]) -> None:
    """Keys under an architecture, ``__`` for ``.``; each a list, a text, a float or an integer."""
    adds = {list: writer.add_array, str: writer.add_string, float: writer.add_float32}
    for name, value in keys.items():
        adds.get(type(value), writer.add_uint32)(f"{arch}.{name.replace('__', '.')}", value)


def _parts(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What a stored weight is made of; experts of gpt-oss are stored together."""
    stem, _, last = name.rpartition(".")
    if last == "sinks":
        return [(f"{name}.weight", weight)]
    if ".experts." not in name:
        return [(name, weight)]
    kind = "bias" if last.endswith("_bias") else "weight"
    if last.startswith("down"):
        return [(f"{stem}.down_proj.{kind}", weight if kind == "bias" else weight.mT)]
    halves = [weight[..., half::2] for half in (0, 1)]
    names = [f"{stem}.gate_proj.{kind}", f"{stem}.up_proj.{kind}"]
    return [(n, half if kind == "bias" else half.mT) for n, half in zip(names, halves, strict=True)]


def _layout(arch: str, name: str, weight: torch.Tensor, config) -> torch.Tensor:
    """A weight as llama.cpp's converter writes it."""
    if arch.startswith("gemma") and "norm" in name:
        return weight + 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if arch in ("llama", "granite") and part in heads:
        return permute_rows(weight, heads[part], to_neighbours=True)
    return weight.contiguous()


def _keys(arch: str, config) -> dict[str, object]:
    """What a file of the architecture says of a model with this config."""
    if (theta := getattr(config, "rope_theta", None)) is None:  # which version 4 has
        rotary = config.rope_parameters
        theta = rotary.get("full_attention", rotary)["rope_theta"]  # gemma3 has two
    keys = {"context_length": config.max_position_embeddings, "vocab_size": config.vocab_size}
    keys |= {"embedding_length": config.hidden_size, "block_count": config.num_hidden_layers}
    keys |= {"feed_forward_length": config.intermediate_size, "rope.freq_base": float(theta)}
    keys |= {"attention.head_count": config.num_attention_heads}
    keys |= {"attention.head_count_kv": config.num_key_value_heads}
    if arch in ("starcoder2", "cohere2"):
        eps = getattr(config, "norm_epsilon", None) or config.layer_norm_eps
        keys["attention.layer_norm_epsilon"] = eps
    else:
        keys["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if head := getattr(config, "head_dim", None):
        keys |= {"attention.key_length": head, "attention.value_length": head}
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if arch == "cohere2":
        keys |= {"logit_scale": config.logit_scale, "rope.dimension_count": config.head_dim}
    if arch == "granite":
        keys["logit_scale"] = float(config.logits_scaling)
        keys["attention.scale"] = float(config.attention_multiplier)
        keys["residual_scale"] = float(config.residual_multiplier)
        keys["embedding_scale"] = float(config.embedding_multiplier)
    return keys


def write_tokenizer(writer, words: list[str] | None = None) -> None:
    """Tokens of two letters, for models that are given ids: whatever is likeliest is a text.

    With ``words`` these, of a tokenizer that puts bos before every text.
    """
    letters = [chr(97 + i) for i in range(26)]
    known = words or [*letters, *(a + b for a in letters for b in letters)][: BYTE_VOCAB - 2]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", *known])
    writer.add_token_types([3, 3] + [1] * len(known))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if not words:
        writer.add_pad_token_id(1)
    writer.add_add_bos_token(bool(words))

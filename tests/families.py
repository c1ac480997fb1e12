"""Tiny random models of many families of transformers, and the contract that all keep."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.studies.architectures import passed_by
from short_gpt import ShortHFModel
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.models.decoder import without_layers
from short_gpt.models.hf import HFDecoder
from short_gpt.scoring.metrics import block_influence
from short_gpt.scoring.run import measure

LAYERS = 6
PLAIN = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
PLAIN |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
PLAIN |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HEAD = {"head_dim": 8}
LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
LLAMA4 |= {"attention_chunk_size": 8, "no_rope_layer_interval": 3}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "shared_expert_intermediate_size": 24}
TYPES = ["linear_attention", "full_attention"] * 3
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK |= {"first_k_dense_replace": 3, "n_group": 1, "topk_group": 1, "q_lora_rank": 16}
DEEPSEEK |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK |= {"num_key_value_heads": 4}
LOCAL = {"attention_types": [[["global", "local"], 3]], "window_size": 8}
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
    # beyond the usual ones: what their configs hold of single layers is a trap each
    "llama4": ("llama4_text", {**PLAIN, **HEAD, **LLAMA4}),  # no_rope_layers, moe_layers
    "gpt_oss": ("gpt_oss", {**PLAIN, **HEAD, "num_local_experts": 4, "sliding_window": 8}),
    "qwen3_next": ("qwen3_next", {**PLAIN, **MOE, **HEAD, **LINEAR, "layer_types": TYPES}),
    "deepseek_v3": ("deepseek_v3", {**PLAIN, **DEEPSEEK}),  # the first 3 layers are dense
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": 96, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, **LOCAL},
    ),
    "cohere2": ("cohere2", {**PLAIN, "sliding_window": 8}),
    "lfm2": ("lfm2", {**PLAIN, "full_attn_idxs": [1, 3, 5], "block_ff_dim": 48}),
    "moe_layer_freq": ("llama", {**PLAIN, "moe_layer_freq": [0, 1, 1, 1, 0, 1]}),
    "llava": ("llava", PLAIN),
    "gemma3, wrapped": ("gemma3", {**PLAIN, **HEAD, "sliding_window": 8}),
}
DROP, KEPT = [1, 4], [0, 2, 3, 5]
TOKENS = torch.arange(3, 23).reshape(2, 10)


def make(family: str, seed: int = 0):
    """A model of the family in evaluation mode, its weights drawn from N(0, 0.2)."""
    kind, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    if kind in ("llava", "gemma3"):
        model = wrapped(kind, arguments).eval()
    else:
        config = AutoConfig.for_model(kind, **arguments)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "conv" not in name and "A_log" not in name:
                weight.normal_(std=0.2)
    return model


def wrapped(kind: str, arguments: dict):
    """A decoder in a multimodal wrapper, beside a tower of as many layers."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    t = transformers
    if kind == "llava":
        tower, text = t.CLIPVisionConfig(**vision, projection_dim=16), t.LlamaConfig(**arguments)
        config = t.LlavaConfig(vision_config=tower, text_config=text, image_token_index=95)
        return t.LlavaForConditionalGeneration(config)
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**vision),
        text_config=t.Gemma3TextConfig(**arguments),
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=93,
        eoi_token_index=94,
    )
    return t.Gemma3ForConditionalGeneration(config)


def score(model, folder: Path) -> None:
    """Block Influence by hooks is that of the states which transformers returns."""
    found = measure(HFDecoder(model), [TOKENS.tolist()])
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
    # the last state is behind the final norm; Mamba's first is behind layer 0, not in front
    first = 1 if model.config.model_type == "mamba" else 0
    for i, (x, y) in enumerate(itertools.pairwise(states[:-1])):
        expected = block_influence(x, y).mean().item()
        assert found.block_influence[first + i].item() == pytest.approx(expected, abs=1e-5)


def padding(model, folder: Path) -> None:
    """Shorter windows of a batch score as if each was alone."""
    ragged = [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]
    padded = measure(HFDecoder(model), [ragged])
    single = measure(HFDecoder(model), [[w] for w in ragged])
    assert (padded.block_influence - single.block_influence).abs().max() < 1e-5
    assert (padded.angular - single.angular).abs().max() < 1e-4


def removal(model, folder: Path) -> None:
    """Layers [1, 4] are gone everywhere; the rest computes what it did, whatever its kind."""
    decoder, whole = HFDecoder(model), HFDecoder(deepcopy(model))
    layers = list(decoder.layers)
    for number in DROP:
        passed_by(whole.layers[number])
    HFDecoder(model).keep_layers(KEPT)
    assert list(decoder.layers) == [layers[i] for i in KEPT]
    assert decoder.config.num_hidden_layers == len(KEPT)
    torch.testing.assert_close(decoder.logits(TOKENS), whole.logits(TOKENS))


def undo(model, folder: Path) -> None:
    """After a trial, layers, config and logits are as before, bit for bit."""
    decoder = HFDecoder(model)
    layers, config, before = list(decoder.layers), model.config.to_dict(), decoder.logits(TOKENS)
    attributes = [dict(vars(module)) for module in model.modules()]
    with without_layers(decoder, DROP):
        assert not torch.equal(decoder.logits(TOKENS), before)
    assert list(decoder.layers) == layers
    assert model.config.to_dict() == config
    assert torch.equal(decoder.logits(TOKENS), before)
    for module, saved in zip(model.modules(), attributes, strict=True):
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | str | list)}
        assert plain == {k: saved[k] for k in plain}


def generation(model, folder: Path) -> None:
    """What is left generates the same with and without the cache."""
    HFDecoder(model).keep_layers(KEPT)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached, uncached = (
            model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=c, **options)
            for c in (True, False)
        )
    assert torch.equal(cached, uncached)


def reload(model, folder: Path) -> None:
    """The saved model, loaded plainly, has the same config and logits, and misses no weight."""
    short = ShortHFModel(model)
    short.remove_layers(DROP)
    short.save_pretrained(folder / "out")  # compares logits and cached generation itself
    again, problems = type(model).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(problems.values()), problems
    found = HFDecoder(again.eval())
    assert (found.logits(TOKENS) - short.decoder.logits(TOKENS)).abs().max() < 1e-5
    assert not changed(model.config, again.config)


def files(model, folder: Path) -> None:
    """Pruning the files without loading them gives the model pruned in memory."""
    model.save_pretrained(folder / "whole", max_shard_size="20KB")
    prune_checkpoint(folder / "whole", folder / "cut", DROP)
    short = ShortHFModel(model)
    short.remove_layers(DROP)
    loaded, problems = type(model).from_pretrained(folder / "cut", output_loading_info=True)
    assert not any(problems.values()), problems
    ours = HFDecoder(loaded.eval())
    assert (ours.logits(TOKENS) - short.decoder.logits(TOKENS)).abs().max() < 1e-5
    assert not changed(model.config, loaded.config)


def changed(config, other) -> set[str]:
    """The keys in which two configs differ, but for those that loading sets itself."""

    def plain(content):
        if not isinstance(content, dict):
            return content
        own = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
        return {key: plain(value) for key, value in content.items() if key not in own}

    expected, found = (
        plain(json.loads(json.dumps(c.to_dict(), default=str))) for c in (config, other)
    )
    return {key for key in expected if found.get(key) != expected[key]}


STEPS: dict[str, Callable] = {
    f.__name__: f for f in (score, padding, removal, undo, generation, reload, files)
}


def check(family: str, step: str, folder: Path) -> None:
    """One step of the contract on a fresh model of the family."""
    try:
        model = make(family)
    except (ValueError, AttributeError) as error:
        if "model_type" not in str(error) and "model identifier" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    STEPS[step](model, folder)

"""Kinds of models beside those of the contract: from `benchmarks/studies/architectures.py`."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers
from conftest import random_windows, refuses
from families import STEPS, TOKENS, make
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.lib.tiny_configs import OWN, VARIANTS, config_of
from benchmarks.studies.architectures import passed_by, random_model
from short_gpt import ShortHFModel, heal_refit
from short_gpt.checkpoints import Target, prune_checkpoint
from short_gpt.checkpoints.verify import fingerprint
from short_gpt.models.decoder import remove_layers, without_layers
from short_gpt.models.hf import HFDecoder
from short_gpt.models.loading import auto_class
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.run import measure

KEPT = (1, 4, 5)  # layers that are refitted without layers 2 and 3
ATTENTION, MLP = ({(layer, part) for layer in KEPT} for part in ("attention", "mlp"))
# what of a tiny model's kept layers is refitted
REFITTED = {
    "bamba": ATTENTION | MLP,
    "falcon_h1": MLP,  # attention and Mamba are added at once
    "falcon_mamba": MLP,
    "glm4": ATTENTION | MLP,
    "gptj": ATTENTION | MLP,
    "granitemoehybrid": MLP,  # experts are added beside the MLP
    "jamba": ATTENTION | {(4, "mlp")},  # layers 1 and 5 have experts
    "lfm2_moe": ATTENTION | {(1, "mlp")},  # all except 0 and 1 have experts
    "lfm3": ATTENTION | MLP,
    "mamba2": MLP,
    "mpt": ATTENTION | MLP,
    "nemotron_h": MLP - {(1, "mlp")},  # layer 1 has experts alone
    "qwen3_5_text": ATTENTION | MLP,
    "qwen3_5_moe_text": ATTENTION,
    "recurrent_gemma": {(layer, part) for layer in (3, 4, 5) for part in ("attention", "mlp")},
    "rwkv, not rescaled": ATTENTION,  # a gate ends the MLP
    "xlstm": ATTENTION | MLP,
}


@pytest.mark.parametrize("kind", REFITTED)
def test_of_every_layer_the_output_projections_are_refitted(kind):
    short = ShortHFModel(random_model(kind))
    # of RecurrentGemma a period of its pattern
    removed = [0, 1, 2] if kind == "recurrent_gemma" else [2, 3]
    refit = heal_refit(short, removed, random_windows(6, 12), progress=False)
    assert {(fit.layer, fit.part) for fit in refit.fits} == REFITTED[kind]


def test_a_stream_of_another_shape_is_refused_by_name():
    short = ShortHFModel(random_model("xlnet"))  # tokens first; its limit of -1 means none
    with pytest.raises(ShortGPTError, match=r"XLNetLayer takes a state of shape \[12, 1, 32\]"):
        short.measure(random_windows(1, 12), progress=False)


def test_a_stream_of_several_parts_is_not_refitted():
    short = ShortHFModel(random_model("qwen4_exp_text"))  # two, of 32 each
    with pytest.raises(ValueError, match="nothing of this model can be refitted"):
        heal_refit(short, [2, 3], random_windows(6, 12), progress=False)


@pytest.mark.parametrize("kind", ["bart", "bert", "gemma4_text", "gpt_neox_japanese"])
def test_decoders_among_encoders_and_settings_of_single_layers_keep_the_contract(kind, tmp_path):
    others = {"bert": ("score", "generation"), "gemma4_text": ("undo", "reload")}
    for step in (*others.get(kind, ["reload"]), "files"):
        STEPS[step](random_model(kind), tmp_path / step)


def test_a_model_that_reads_in_both_directions_is_refused():
    config = AutoConfig.for_model(
        "bert", num_hidden_layers=4, hidden_size=24, num_attention_heads=2
    )
    with pytest.raises(ShortGPTError, match="BertLMHeadModel is an encoder, whose tokens see"):
        ShortHFModel(AutoModelForCausalLM.from_config(config))
    config.is_decoder = True
    assert len(ShortHFModel(AutoModelForCausalLM.from_config(config)).kept) == 4


def test_layers_that_predict_further_tokens_do_not_go_along(tmp_path, monkeypatch):
    """They follow the last in DeepSeek's files, and transformers reads none of them."""
    model = random_model("deepseek_v3")
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(path := tmp_path / "m/model.safetensors")
    further = "model.layers.6.self_attn.o_proj.weight"
    save_file({**tensors, further: tensors[further.replace("6", "5")].clone()}, path)
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.6.*"])
    out = prune_checkpoint(tmp_path / "m", Target(tmp_path / "out"), [4])
    assert not [n for n in load_file(out / "model.safetensors") if ".layers.5." in n]
    again = ShortHFModel(out)
    assert again.model.config.num_nextn_predict_layers == 0
    memory = ShortHFModel(deepcopy(model))
    memory.remove_layers([4])
    saved = AutoConfig.from_pretrained(memory.save_pretrained(tmp_path / "saved"))
    assert saved.num_nextn_predict_layers == 0
    with without_layers(decoder := HFDecoder(model), [4]):
        torch.testing.assert_close(again.decoder.logits(TOKENS), decoder.logits(TOKENS))
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", None)
    with pytest.raises(ShortGPTError, match="one list of them; the files hold"):
        prune_checkpoint(tmp_path / "m", Target(tmp_path / "other"), [4])


def test_settings_of_single_layers_follow_their_layers():
    decoder = HFDecoder(random_model("gemma4_text"))
    wide = [layer.self_attn.o_proj.in_features for layer in decoder.layers]
    assert wide == [32, 32, 32, 32, 32, 64]  # the last layer has wider heads
    remove_layers(decoder, [1, 4])
    assert [one.head_dim for one in decoder.config.per_layer_config] == [8, 8, 8, 16]


def test_layers_that_read_keys_of_others_are_not_removed():
    model = random_model("gemma4_text")
    model.config.num_kv_shared_layers = 2
    refuses(r"read keys and values of others", remove_layers, HFDecoder(model), [1])


def test_a_hybrid_keeps_a_layer_with_attention():
    decoder = HFDecoder(random_model("nemotron_h"))  # with attention in 2 and 5
    refuses(r"cannot be removed: no layer with attention would be", remove_layers, decoder, [2, 5])
    assert len(decoder.layers) == 6
    remove_layers(decoder, [2, 4])
    assert decoder.config.layer_types == ["linear_attention", "moe", "mlp", "full_attention"]


def test_layers_that_run_several_times_in_a_pass_are_not_scored():
    with pytest.raises(ValueError, match="a pass ran layers 8 times, expected each of 6 once"):
        measure(HFDecoder(random_model("dory")), [TOKENS.tolist()])


def test_a_config_may_list_a_width_for_each_layer(tmp_path):
    model = random_model("gemma3n_text")
    model.save_pretrained(tmp_path)
    assert ShortHFModel(tmp_path).configuration["intermediate_size"] == [48] * 6


def test_a_model_of_several_lists_of_layers_is_refused():
    refuses("BltForCausalLM has 0 lists of None layers", HFDecoder, random_model("blt"))


def test_a_model_around_a_decoder_may_be_among_the_causal_language_models():
    loader = auto_class(config_of("moss_transcribe_diarize"))
    assert loader is transformers.AutoModelForCausalLM


def test_a_model_in_memory_that_rounds_otherwise_is_copied_before_it_is_compared(tmp_path):
    """As one whose weights are mapped from a file, where they may be unaligned."""
    model = make("llama")
    weight, place = model.lm_head.weight, torch.empty(model.lm_head.weight.numel() + 1)[1:]
    place.copy_(weight.detach().flatten())
    weight.data = place.view_as(weight)

    def rounded(module, _, out):
        return out * (1 + 1e-6 * (module.weight.data_ptr() % 64 != 0))

    model.lm_head.register_forward_hook(rounded)
    short = ShortHFModel(model)
    before = fingerprint(short).logits
    short.save_pretrained(tmp_path / "out")
    assert not torch.equal(fingerprint(short).logits, before)  # it has been copied
    weight.data = weight.data + 1.0
    refuses("in memory: logits differ", short.check_saved, tmp_path / "out", error=RuntimeError)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_hooks_around_layers_are_the_model_without_them(kind):
    """The benchmark's reference: of layers that return a state, and a tuple."""
    model = make(kind)
    decoder = HFDecoder(model)
    with without_layers(decoder, [1, 4]):
        expected = decoder.logits(TOKENS)
    whole = decoder.logits(TOKENS)
    for layer in (1, 4):
        passed_by(decoder.layers[layer])
    assert torch.equal(decoder.logits(TOKENS), expected)
    assert not torch.equal(whole, expected)


@pytest.mark.parametrize("kind", [*OWN, *VARIANTS])
def test_own_entries_make_a_config(kind):
    assert config_of(kind).model_type == VARIANTS.get(kind, (kind, {}))[0].replace("-sw3", "2")

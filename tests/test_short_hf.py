"""One contract for many families of transformers: score, removal, undo, generation, reload."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, LAYERS, make

from short_gpt import ShortHFModel
from short_gpt.hf_decoder import HFDecoder, find_layers
from short_gpt.importance import measure
from short_gpt.layer_removal import remove_layers, without_layers
from short_gpt.metrics import block_influence

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
TOKENS = torch.arange(3, 23).reshape(2, 10)
DROP, KEPT = [1, 4], [0, 2, 3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_states(family):
    model = make(family)
    found = measure(HFDecoder(model), [TOKENS.tolist()])
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
    # the last state is behind the final norm; Mamba's first is behind layer 0, not in front
    first = 1 if family == "mamba" else 0
    for i, (x, y) in enumerate(itertools.pairwise(states[:-1])):
        expected = block_influence(x, y).mean().item()
        assert found.block_influence[first + i].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count(family):
    model, ragged = make(family), [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]
    padded = measure(HFDecoder(model), [ragged])
    single = measure(HFDecoder(model), [[w] for w in ragged])
    assert (padded.block_influence - single.block_influence).abs().max() < 1e-5
    assert (padded.angular - single.angular).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_undo_generation_and_reload(family, tmp_path):
    model = make(family)
    decoder = HFDecoder(model)
    layers, config, before = list(decoder.layers), model.config.to_dict(), decoder.logits(TOKENS)
    with without_layers(decoder, DROP):
        assert list(decoder.layers) == [layers[i] for i in KEPT]
        assert decoder.config.num_hidden_layers == 4
        assert not torch.equal(decoder.logits(TOKENS), before)
    assert list(decoder.layers) == layers
    assert model.config.to_dict() == config
    assert torch.equal(decoder.logits(TOKENS), before)

    short = ShortHFModel(model)
    assert short.remove_layers(DROP) == DROP
    short.save_pretrained(tmp_path / "out")  # compares logits and cached generation itself
    again = HFDecoder(type(model).from_pretrained(tmp_path / "out").eval())
    assert (again.logits(TOKENS) - decoder.logits(TOKENS)).abs().max() < 1e-5
    with torch.no_grad():
        cached, uncached = (
            model.generate(
                TOKENS, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0
            )
            for cache in (True, False)
        )
    assert torch.equal(cached, uncached)


def test_a_fresh_process_gives_the_same_logits(tmp_path):
    model = make("smollm3")
    short = ShortHFModel(model)
    short.remove_layers(DROP)
    short.save_pretrained(tmp_path / "out")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        "m = M.from_pretrained(sys.argv[1]).eval(); t = torch.arange(3, 23).reshape(2, 10)\n"
        "torch.save(m(t).logits.detach(), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), short.decoder.logits(TOKENS))


def test_the_head_is_not_run_when_scoring():
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    measure(HFDecoder(model), [TOKENS.tolist()])


def test_an_identity_layer_goes_first_and_leaves_no_trace():
    model = make("llama")
    with torch.no_grad():
        model.model.layers[5].self_attn.o_proj.weight.zero_()
        model.model.layers[5].mlp.down_proj.weight.zero_()
    short = ShortHFModel(model, n_prune_layers=1)
    short.measure(TOKENS.tolist(), progress=False)
    before = short.decoder.logits(TOKENS)
    assert short.importances[5] < 1e-6  # before the final norm, unlike hidden_states[-1]
    assert short.remove_layers() == [5]
    assert torch.equal(short.decoder.logits(TOKENS), before)


def test_what_the_config_cannot_say_is_refused_and_undone():
    """Every second layer has experts; without layer 1 the rule of the config gives others."""
    from families import MOE, PLAIN
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_moe", **PLAIN, **MOE, head_dim=8, decoder_sparse_step=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = HFDecoder(model)
    before, saved = decoder.logits(TOKENS), model.config.to_dict()
    with pytest.raises(ValueError, match="cannot be removed: its config would make layer 1"):
        remove_layers(decoder, [1])
    assert torch.equal(decoder.logits(TOKENS), before)
    assert model.config.to_dict() == saved
    remove_layers(decoder, [2, 3])  # keeps the rule


def multimodal(name: str):
    """A tiny model whose decoder sits in a wrapper, beside a tower of as many layers."""
    import transformers as t
    from families import PLAIN

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    if name == "llava":
        tower, text = t.CLIPVisionConfig(**vision, projection_dim=16), t.LlamaConfig(**PLAIN)
        config = t.LlavaConfig(vision_config=tower, text_config=text, image_token_index=95)
        return t.LlavaForConditionalGeneration(config).eval()
    text = t.Gemma3TextConfig(**PLAIN, head_dim=8, sliding_window=8)
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**vision),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=93,
        eoi_token_index=94,
    )
    return t.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_decoder_inside_a_multimodal_wrapper(name, tmp_path):
    model = multimodal(name)
    short = ShortHFModel(model, "model.language_model.layers", n_prune_layers=2)
    short.measure(TOKENS.tolist(), progress=False)
    assert short.importances.shape == (LAYERS,)
    short.remove_layers(DROP)
    assert model.config.text_config.num_hidden_layers == 4
    assert model.config.vision_config.num_hidden_layers == LAYERS
    short.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    found = HFDecoder(again, "model.language_model.layers").logits(TOKENS)
    assert (found - short.decoder.logits(TOKENS)).abs().max() < 1e-5


def test_the_card_and_the_record_say_what_was_done(tmp_path):
    short = ShortHFModel(make("llama"), n_prune_layers=2)
    short.measure(TOKENS.tolist(), progress=False)
    whole = short.perplexity(TOKENS.tolist(), progress=False)
    removed = short.remove_layers()
    left = short.perplexity(TOKENS.tolist(), progress=False)
    with short.without_layers([short.kept[0]]):  # a trial of something else is not the model's
        short.perplexity(TOKENS.tolist(), progress=False)
    short.save_pretrained(tmp_path / "out", facts={"data": "twenty tokens"})
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert (record["removed_layers"], record["kept_layers"]) == (removed, short.kept)
    assert record["block_influence"] == short.importances.tolist()
    assert record["perplexity"] == {"6 layers": whole.value, "4 layers": left.value}
    card = (tmp_path / "out/README.md").read_text()
    assert f"    {removed}" in card and "20 tokens of twenty tokens in 2 windows" in card
    assert f"| 6 | {whole.value:.3f} | 18 |\n| 4 | {left.value:.3f} | 18 |" in card
    assert (tmp_path / "out/generation_config.json").is_file()


def test_another_choice_of_as_many_layers_does_not_pass_for_the_model(tmp_path):
    short = ShortHFModel(make("llama"))
    for layers in ([0, 1], [2, 3]):
        with short.without_layers(layers):
            short.perplexity(TOKENS.tolist(), progress=False)
    short.remove_layers([0, 1])
    short.save_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    expected = short.perplexity(TOKENS.tolist(), progress=False).value
    assert record["perplexity"] == {"4 layers": expected}


def test_a_trial_names_original_layers_and_gives_the_model_back():
    short = ShortHFModel(make("llama"))
    short.remove_layers([0])
    before = short.decoder.logits(TOKENS)
    with short.without_layers([1, 5]):
        assert len(short.decoder.layers) == 3
    assert torch.equal(short.decoder.logits(TOKENS), before)
    with pytest.raises(ValueError, match=r"layers \[0\] do not exist"), short.without_layers([0]):
        pass


def test_layers_are_found_or_named():
    model = make("opt")
    assert find_layers(model) == "model.decoder.layers"
    assert len(HFDecoder(model, "model.decoder.layers").layers) == LAYERS
    with pytest.raises(ValueError, match=r"model\.h is no list of layers of OPTForCausalLM"):
        HFDecoder(model, "model.h")


def test_texts_need_a_tokenizer_and_loading_options_a_name():
    short = ShortHFModel(make("llama"))
    with pytest.raises(ValueError, match="pass tokenizer="):
        short.eval_importance(["a text"], max_seq_len=16)
    with pytest.raises(ValueError, match=r"options \['dtype'\] are for loading"):
        ShortHFModel(make("llama"), dtype="float32")


def test_a_model_that_reloads_otherwise_is_not_saved(tmp_path, monkeypatch):
    short = ShortHFModel(make("llama"))
    short.remove_layers(DROP)
    plain = short.model.save_pretrained

    def spoiled(directory):
        short.model.model.norm.weight.data += 1
        plain(directory)
        short.model.model.norm.weight.data -= 1

    monkeypatch.setattr(short.model, "save_pretrained", spoiled)
    with pytest.raises(RuntimeError, match="logits differ by up to"):
        short.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""One contract for many families of transformers: score, removal, undo, generation, reload."""

from __future__ import annotations

import itertools
import json
import os
from itertools import pairwise

import pytest
import torch
import transformers
from conftest import BYTE_VOCAB, interrupted, random_windows, refuses, write_byte_tokenizer
from families import DROP, FAMILIES, KEPT, LAYERS, MOE, PLAIN, STEPS, TOKENS, check, make
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from short_gpt import ShortHFModel, heal_refit, open_model, shrink
from short_gpt.checkpoints import Provenance
from short_gpt.models import hf as hf_decoder
from short_gpt.models.decoder import remove_layers, without_layers
from short_gpt.models.hf import HFDecoder, find_layers
from short_gpt.models.loading import auto_class
from short_gpt.runtime.digest import weights_digest
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError
from short_gpt.scoring.metrics import block_influence
from short_gpt.scoring.run import measure


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family, step, tmp_path):
    check(family, step, tmp_path)


CALLS = {
    "measure": lambda short, read: short.measure(read, progress=False).to_dict(),
    "score": lambda short, read: short.score_batch(read).influence.tolist(),
    "perplexity": lambda short, read: short.perplexity(read, progress=False).nats,
    "losses": lambda short, read: [p.nats for p in short.window_perplexities(read, progress=False)],
    "logits": lambda short, read: [row.tolist() for row in short.window_logits(read)],
    "search": lambda short, read: short.search(read, 2, progress=False).losses,
    "refit": lambda short, read: weights_digest(
        (heal_refit(short, [2], read, progress=False), short.model)[1]
    ),
    "greedy": lambda short, read: short.greedy(read[0], 12),
    "continued": lambda short, read: continued(short, read),
}


def continued(short, read):
    seen = []
    short.continued(read, 3, lambda logits: seen.append(logits.tolist()) or logits.argmax(-1))
    return seen


@pytest.mark.parametrize("call", CALLS)
def test_a_model_in_training_mode_is_read_without_dropout(call):
    found = []
    for training in (False, True):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_layer=5, n_head=4, vocab_size=96, n_positions=64)
        short = ShortHFModel(GPT2LMHeadModel(config))
        if training:
            short.model.train()
            short.model.transformer.h[3].eval()  # as somebody who trains a part
        modes = [part.training for part in short.decoder.layers]
        found.append(CALLS[call](short, random_windows(6, 16)))
        assert short.model.training == training
        kept = [mode for i, mode in enumerate(modes) if i in short.kept]
        assert [part.training for part in short.decoder.layers] == kept
    assert found[0] == found[1]


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
    config = AutoConfig.for_model("qwen3_moe", **PLAIN, **MOE, head_dim=8, decoder_sparse_step=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = HFDecoder(model)
    before, saved = decoder.logits(TOKENS), model.config.to_dict()
    refuses("cannot be removed: its config would make layer 1", remove_layers, decoder, [1])
    assert torch.equal(decoder.logits(TOKENS), before)
    assert model.config.to_dict() == saved
    remove_layers(decoder, [2, 3])  # keeps the rule


@pytest.mark.parametrize("family", ["llava", "gemma3, wrapped"])
def test_the_tower_beside_the_decoder_keeps_its_layers(family, tmp_path):
    model = make(family)
    assert find_layers(model) == "model.language_model.layers"
    short = ShortHFModel(model, n_prune_layers=2)
    short.measure(TOKENS.tolist(), progress=False)
    assert short.importances.shape == (LAYERS,)
    short.remove_layers(DROP)
    assert model.config.text_config.num_hidden_layers == 4
    assert model.config.vision_config.num_hidden_layers == LAYERS
    model = make(family)
    lists = (n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    tower = next(name for name in lists if "vision" in name)
    refuses("its config would make 6 layers, not", HFDecoder(model, tower).keep_layers, KEPT)


def test_the_card_and_the_record_say_what_was_done(tmp_path):
    short = ShortHFModel(make("llama"), n_prune_layers=2)
    short.measure(TOKENS.tolist(), progress=False)
    evaluated = [*TOKENS.tolist(), TOKENS[0].flip(0).tolist()]  # two windows have no interval
    whole = short.perplexity(evaluated, progress=False)
    removed = short.remove_layers()
    left = short.perplexity(evaluated, progress=False)
    with short.without_layers([short.kept[0]]):  # a trial of something else is not the model's
        short.perplexity(TOKENS.tolist(), progress=False)
    short.quality[0, 1, 2, 3] = whole  # nor are as many other layers
    short.save_pretrained(tmp_path / "out", facts={"data": "twenty tokens"})
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert (record["removed_layers"], record["kept_layers"]) == (removed, short.kept)
    assert record["block_influence"] == short.importances.tolist()
    assert record["perplexity"] == {"6 layers": whole.value, "4 layers": left.value}
    card = (tmp_path / "out/README.md").read_text()
    assert f"    {removed}" in card and "20 tokens of twenty tokens in 2 windows" in card
    for name, found in (("6 layers", whole), ("4 layers", left)):
        low, high = found.interval()
        assert f"| {name} | {found.value:.3f} | {low:.3f} to {high:.3f} | 27 |" in card
    assert (tmp_path / "out/generation_config.json").is_file()


def test_a_models_own_settings_do_not_change_what_generation_returns():
    short = ShortHFModel(make("llama"))
    plain = short.greedy([5, 6, 7], 8)
    short.model.generation_config.return_dict_in_generate = True
    assert short.greedy([5, 6, 7], 8) == plain and len(plain) == 8


def test_a_trial_inside_a_trial_names_original_layers_too():
    short = ShortHFModel(make("llama"))
    layers = list(short.decoder.layers)
    with short.without_layers([0]):
        with short.without_layers([3]):
            assert list(short.decoder.layers) == [layers[i] for i in (1, 2, 4, 5)]
            inner = short.perplexity(TOKENS.tolist(), progress=False)
        outer = short.perplexity(TOKENS.tolist(), progress=False)
        with pytest.raises(ValueError, match=r"layers \[0\] do not"), short.without_layers([0]):
            pass
    assert list(short.decoder.layers) == layers
    assert short.quality == {(1, 2, 4, 5): inner, (1, 2, 3, 4, 5): outer}


def test_a_trial_cannot_be_saved_as_the_model(tmp_path):
    short = ShortHFModel(make("llama"))
    with short.without_layers([1]), pytest.raises(ShortGPTError, match="has 5 layers, expected 6"):
        short.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_causal_language_model_is_refused():
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 2}
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, vocab_size=50))
    refuses("T5.* is not a causal .*: it has an encoder and", ShortHFModel, both)
    for model in (
        make("llama").model,
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**PLAIN)),
    ):
        refuses("has no language-model head", ShortHFModel, model)


def test_layers_that_share_weights_are_refused():
    model = make("llama")
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    refuses("cannot be removed: 1 and 3 share weights", remove_layers, HFDecoder(model), [0])
    assert len(model.model.layers) == LAYERS


def test_layers_that_return_lists_are_scored_and_searched():
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = AutoConfig.for_model("openai-gpt", **sizes)
    short = ShortHFModel(AutoModelForCausalLM.from_config(config))
    short.measure(TOKENS.tolist(), progress=False)
    states = short.model(TOKENS, output_hidden_states=True).hidden_states
    by_hand = [block_influence(x, y).mean().item() for x, y in pairwise(states)]
    assert short.importances.tolist() == pytest.approx(by_hand, rel=1e-4, abs=1e-7)
    (removed,) = short.search(TOKENS.tolist(), 1, progress=False).removed
    with short.without_layers([removed]):
        expected = short.perplexity(TOKENS.tolist(), progress=False).value
    assert 1 < expected < 200


def test_per_layer_entries_are_cut_and_nothing_else_is():
    model = make("qwen3_moe")
    config = model.config
    config.moe_layer_freq, config.eos_token_id = [0, 1, 1, 1, 0, 2], [2, 3, 4, 5, 6, 7]
    undo = HFDecoder(model).keep_layers(KEPT)
    assert config.mlp_only_layers == [0, 2]  # [0, 3] in the old numbers
    assert config.moe_layer_freq == [0, 1, 1, 2]
    assert config.eos_token_id == [2, 3, 4, 5, 6, 7]  # as many as layers, by chance
    undo()
    assert (config.mlp_only_layers, config.moe_layer_freq) == ([0, 3], [0, 1, 1, 1, 0, 2])


def test_a_count_that_the_model_keeps_follows_the_config():
    """Gemma 4 remembers from which layer on keys and values are shared: here, from none."""
    transformers = pytest.importorskip("transformers", minversion="5")
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this version of transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        **{**PLAIN, "head_dim": 8, "global_head_dim": 8, "sliding_window": 8},
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    decoder = HFDecoder(model)
    undo = decoder.keep_layers([0, 3, 4, 5])
    assert model.model.first_kv_shared_layer_idx == 4
    undo()
    assert model.model.first_kv_shared_layer_idx == LAYERS
    before = model(TOKENS).logits
    undo = decoder.keep_layers(KEPT)  # the last layer of a kind would store keys: nobody reads them
    assert model.model.first_kv_shared_layer_idx == len(KEPT)
    undo()
    assert torch.equal(model(TOKENS).logits, before)


def test_first_layers_of_another_kind_are_counted_anew():
    model = make("deepseek_v3")
    remove_layers(HFDecoder(model), [0, 4])
    assert model.config.first_k_dense_replace == 2
    model = make("llama")
    model.config.num_dense_layers = 3
    remove_layers(HFDecoder(model), DROP)
    assert model.config.num_dense_layers == 2


def test_layers_that_compute_with_their_number_are_refused():
    kind, arguments = FAMILIES["gpt2"]
    config = AutoConfig.for_model(kind, **arguments, scale_attn_by_inverse_layer_idx=True)
    decoder = HFDecoder(AutoModelForCausalLM.from_config(config).eval())
    refuses("compute with their own number", decoder.keep_layers, KEPT)
    assert len(decoder.layers) == decoder.config.num_hidden_layers == LAYERS


def test_any_failure_of_the_proof_gives_the_model_back(monkeypatch):
    model = make("llama")
    decoder, saved = HFDecoder(model), model.config.to_dict()

    class Broken(type(model)):
        def __init__(self, config):
            raise IndexError("no layer\n7")

    monkeypatch.setattr(model, "__class__", Broken)
    refuses("cannot be removed: its config would make no model: no l", decoder.keep_layers, KEPT)
    assert len(decoder.layers) == LAYERS and model.config.to_dict() == saved


def test_what_a_config_sizes_outside_the_layers_is_refused():
    """Gemma 3n keeps embeddings for every layer in one matrix."""
    config = Gemma3nTextConfig(
        **{**PLAIN, "intermediate_size": [48] * LAYERS, "head_dim": 8, "laurel_rank": 4},
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=96,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * LAYERS,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=8,
    )
    decoder = HFDecoder(AutoModelForCausalLM.from_config(config).eval())
    before = decoder.logits(TOKENS)
    refuses(r"would make model\.\S+ = .* around the layers", decoder.keep_layers, KEPT)
    assert torch.equal(decoder.logits(TOKENS), before)


def test_hundreds_of_trials_share_one_proof_and_draw_no_random_number(monkeypatch):
    model, made = make("llama"), []
    decoder, state = HFDecoder(model), torch.get_rng_state()
    plain = hf_decoder.twin_outline
    monkeypatch.setattr(hf_decoder, "twin_outline", lambda *a: made.append(a) or plain(*a))
    for layers in itertools.combinations(range(LAYERS), 2):
        with without_layers(decoder, layers):
            pass
    assert len(made) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_replaced_weights_as_of_a_quantized_model_can_be_cut():
    """The twin of its config has plain weights; that is no harm of the removal."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.packed = torch.nn.Parameter(linear.weight.detach().flatten())
            self.shape = tuple(linear.weight.shape)

        def forward(self, x):
            return x @ self.packed.view(self.shape).T

    model, whole = make("llama"), make("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    remove_layers(HFDecoder(model), DROP)
    remove_layers(HFDecoder(whole), DROP)
    assert torch.equal(HFDecoder(model).logits(TOKENS), HFDecoder(whole).logits(TOKENS))
    model.model.layers[1].mlp = torch.nn.Identity()  # but a layer cut by hand stays a stranger
    remove_layers(HFDecoder(model), [0])
    with pytest.raises(ValueError, match="is not a list of layers of LlamaForCausalLM, 2 long"):
        model.config.num_hidden_layers = 2
        HFDecoder(model, "model.layers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Llama with a tokenizer, as from the hub."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**PLAIN, "vocab_size": BYTE_VOCAB})).save_pretrained(path)
    write_byte_tokenizer(path)
    return path


PLACES = {
    f"{'model.' * (n != 'lm_head')}{n}": "cpu"
    for n in ("embed_tokens", "norm", "rotary_emb", "lm_head", *(f"layers.{i}" for i in range(6)))
}
OPTIONS = {
    "device": {"device": "cpu"},
    "one place": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto"},
    "layers on disk": {"device_map": PLACES | {f"model.layers.{i}": "disk" for i in (1, 2, 5)}},
    "embedding on disk": {"device_map": PLACES | {"model.embed_tokens": "disk"}},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wherever_the_weights_are_the_model_is_the_same(case, directory, tmp_path):
    options = OPTIONS[case] | ({"offload_folder": tmp_path / "off"} if "disk" in case else {})
    whole = ShortHFModel(str(directory), n_prune_layers=2)
    short = ShortHFModel(str(directory), n_prune_layers=2, **options)
    if "disk" in case:
        assert any(weight.is_meta for weight in short.model.parameters())
    before = short.decoder.logits(TOKENS)
    for each in (whole, short):
        assert not getattr(each.model, "use_kernels", False)
        each.eval_importance(["It was the best of times"], max_seq_len=16)
    assert torch.equal(short.importances, whole.importances)
    with short.without_layers([2]):
        assert not torch.equal(short.decoder.logits(TOKENS), before)
    assert torch.equal(short.decoder.logits(TOKENS), before)
    assert short.remove_layers() == whole.remove_layers()
    assert torch.equal(short.decoder.logits(TOKENS), whole.decoder.logits(TOKENS))
    assert short.generate(["It"], 5, 0) == whole.generate(["It"], 5, 0)
    again = ShortHFModel(short.save_pretrained(tmp_path / "out"))
    assert torch.equal(again.decoder.logits(TOKENS), whole.decoder.logits(TOKENS))


def test_dtypes_are_the_files_unless_asked(directory, tmp_path):
    assert ShortHFModel(str(directory)).model.dtype == torch.float32
    half = ShortHFModel(str(directory), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    half.remove_layers(DROP)
    half.save_pretrained(tmp_path / "half")
    assert ShortHFModel(str(tmp_path / "half")).model.dtype == torch.bfloat16


def test_a_directory_without_a_tokenizer(directory, tmp_path):
    whole = ShortHFModel(str(directory))
    whole.model.save_pretrained(tmp_path / "weights")
    short = ShortHFModel(tmp_path / "weights")
    assert torch.equal(short.decoder.logits(TOKENS), whole.decoder.logits(TOKENS))
    refuses("weights came without a tokenizer, .*pass tokenizer=", short.generate, ["It"], 5, 0)
    short = ShortHFModel(tmp_path / "weights", tokenizer=whole.tokenizer)
    assert short.generate(["It"], 5, 0) == whole.generate(["It"], 5, 0)


def test_sampling_draws_from_all_that_top_p_leaves():
    short, drawn = ShortHFModel(make("llama")), set()
    with torch.no_grad():
        short.model.lm_head.weight.mul_(1e-3)  # every token is about as likely
    for seed in range(300):
        torch.manual_seed(seed)
        drawn.add(short._continue([1, 2, 3], 1, 1.0, 1.0)[-1])
    assert len(drawn) > 60, "the 50 likeliest alone"


def test_a_window_of_gemma_begins_with_bos_where_texts_are_scored(directory, monkeypatch):
    short, read = ShortHFModel(directory), []
    short.encode = lambda text: [1, *map(ord, text)]
    monkeypatch.setattr(type(short), "bos", property(lambda _: "every"))
    monkeypatch.setattr(short, "measure", lambda windows, **_: read.extend(windows))
    short.eval_importance(["It was a bright cold day"], max_seq_len=8, stride=4)
    assert len(read) > 2 and {window[0] for window in read} == {1}


def test_a_temperature_that_is_all_but_0_takes_the_likeliest_token(directory):
    short = ShortHFModel(directory)
    likeliest = short.generate(["It was"], max_gen_len=4, temperature=0)
    assert short.generate(["It was"], max_gen_len=4, temperature=1e-45) == likeliest


def test_texts_to_continue_are_a_list_of_some_tokens(directory):
    short = ShortHFModel(str(directory))
    refuses("expected a list of texts, got one string", short.generate, "It", 5)
    short.encode = lambda _: []
    refuses("no tokens to continue", short.generate, [""], 5)
    refuses("no tokens to continue", short.eval_importance, [""], max_seq_len=8, max_gen_len=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "cannot be loaded: .*int4"),
        ({"device": "tpu"}, ": expected one of cpu"),
        ({"device": "cpu", "device_map": "auto"}, "None where a device_map"),
        ({"device_map": "nowhere"}, "cannot be loaded: .*nowhere"),
        ({"no_such_option": 3}, "cannot be loaded: .*no_such_option"),
        ({"layers_path": "model.h"}, r"model\.h is not a list of layers of LlamaForCausalLM"),
        ({"layers_path": 9}, "9 is not a list of layers of LlamaForCausalLM, 6 long"),
    ],
)
def test_wrong_options_get_one_line(directory, options, message):
    refuses(message, ShortHFModel, str(directory), **options)


def test_where_the_files_are_from_holds_for_the_tokenizer_too(directory, monkeypatch):
    seen = {}
    for name in ("AutoTokenizer", "AutoConfig"):
        plain = getattr(transformers, name).from_pretrained

        def spy(*args, plain=plain, name=name, **options):
            seen.setdefault(name, options)
            return plain(*args, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", spy)
    ShortHFModel(str(directory), revision="main", dtype="float32")
    assert all(seen[n]["revision"] == "main" and "dtype" not in seen[n] for n in seen)
    assert len(seen) == 2


def test_a_wrapped_model_is_loaded_whole_by_its_name(tmp_path):
    model = make("llava")
    model.save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    short = ShortHFModel(str(tmp_path))
    assert type(short.model) is type(model)
    with pytest.raises(ValueError, match="a model of type 'clip' is not a causal language model"):
        auto_class(model.config.vision_config.__class__.from_dict({"model_type": "clip"}))


def test_loading_options_need_a_name():
    refuses(r"options = \['dtype'\]: expected none", ShortHFModel, make("llama"), dtype="float32")


def test_the_copy_that_proves_attends_as_the_model_does(directory, tmp_path, monkeypatch):
    """Another implementation rounds otherwise."""
    short = ShortHFModel(directory, attn_implementation="eager")
    short.remove_layers([2])
    opened, load = [], LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM,
        "from_pretrained",
        lambda *a, **kw: opened.append(load(*a, **kw)) or opened[-1],
    )
    short.save_pretrained(tmp_path / "out")
    assert opened[-1].config._attn_implementation == "eager"


def test_a_model_saved_over_its_source_keeps_its_history(directory, tmp_path):
    short = ShortHFModel(directory)
    short.remove_layers([4])
    short.save_pretrained(tmp_path / "own")
    again = ShortHFModel(tmp_path / "own")
    for layer in (0, 1):
        again.remove_layers([layer])
        again.save_pretrained(tmp_path / "own", overwrite=True)
    record = Provenance.of_checkpoint(tmp_path / "own")
    assert record.original_layers == [2, 3, 5] and record.earlier.removed_layers == [4]


def test_scores_of_a_model_before_its_weights_changed_are_not_added_to():
    short, windows = ShortHFModel(make("llama")), random_windows(3, 16)
    short.measure(windows, progress=False)
    undo = short.change_weights(
        {"method": "a test"}, {(1, "mlp.down_proj.weight"): torch.zeros(32, 48)}
    )
    short.measure(windows, progress=False)
    changed = short.importances
    assert short.n_windows == 3
    fresh = ShortHFModel(short.model)
    fresh.measure(windows, progress=False)
    assert torch.equal(fresh.importances, changed)
    undo()
    with interrupted(ShortHFModel, "score_batch", 0):
        short.measure(windows, progress=False)
    short.measure(windows[:1], progress=False)
    assert short.n_windows == 1


def test_a_layer_that_reads_what_another_selects_does_not_stay_alone():
    model = make("llama")
    model.config.indexer_types = ["full", "full", "shared", "full", "shared", "shared"]
    decoder = HFDecoder(model)
    for drop, message in (([1], "2 reads the tokens that layer 1"), ([0, 3], "4 reads .* 3 sel")):
        refuses(message, remove_layers, decoder, drop, error=NotRemovableError)
    remove_layers(decoder, [0, 2])
    assert model.config.indexer_types == ["full", "full", "shared", "shared"]


def test_a_model_that_reloads_otherwise_is_not_saved(tmp_path, monkeypatch):
    short = ShortHFModel(make("llama"))
    short.remove_layers(DROP)
    plain = short.model.save_pretrained

    def spoiled(directory):
        short.model.model.norm.weight.data += 1
        plain(directory)
        short.model.model.norm.weight.data -= 1

    monkeypatch.setattr(short.model, "save_pretrained", spoiled)
    refuses("logits differ by up to", short.save_pretrained, tmp_path / "out", error=RuntimeError)
    assert list(tmp_path.iterdir()) == []


def test_where_the_causal_kernel_is_wrong_it_is_not_used(directory, tmp_path, monkeypatch):
    expected = ShortHFModel(str(directory)).decoder.logits(TOKENS)
    monkeypatch.setattr("short_gpt.wrappers.short_hf.MASKED", ("cpu",))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    short = ShortHFModel(str(directory))
    torch.testing.assert_close(short.decoder.logits(TOKENS), expected, rtol=1e-4, atol=1e-5)
    short.remove_layers(DROP)
    short.save_pretrained(tmp_path / "out")  # which compares it with a copy that computes alike


def test_what_offloaded_weights_cannot_do_is_told(directory, tmp_path):
    options = OPTIONS["layers on disk"] | {"offload_folder": tmp_path / "off"}
    short = ShortHFModel(str(directory), **options)
    assert short.runs_in() == (torch.float32, torch.device("cpu"))
    windows = [[1, 2, 3, 4]] * 3
    refuses("is offloaded, and so nothing identifies the model", short.identity)
    refuses(r"offloaded|not in memory", heal_refit, short, [2], windows, progress=False)


def test_what_a_tokenizer_puts_after_a_text_is_not_continued(tmp_path):
    file = str(write_byte_tokenizer(tmp_path))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>")
    short, prompts = ShortHFModel(make("llama"), tokenizer=tokenizer), ["ab"]
    backend, ends = short.tokenizer.backend_tokenizer, [("<s>", 0), ("</s>", 1)]
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=ends)
    plain = short.generate(prompts, 5, temperature=0)
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert short.encode("ab")[-1] == 1
    assert short.generate(prompts, 5, temperature=0) == plain
    short.eval_importance(prompts, max_seq_len=16, max_gen_len=4, temperature=0)
    assert short.n_windows == 1


def test_a_model_with_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(make("llama"), config)
    for model in (adapted, adapted.base_model.model):
        refuses("has an adapter at .*q_proj, .* merge it", ShortHFModel, model)
    assert ShortHFModel(adapted.merge_and_unload()).kept


def test_a_model_without_values_is_refused():
    refuses("is on the device meta", ShortHFModel, make("llama").to("meta"))


def in_inference_mode(model):
    with torch.inference_mode():
        return model.double().float()


def some_in_bfloat16(model, *paths):
    for path in paths:
        model.get_submodule(path).bfloat16()
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: 5, "model_name = 5: expected a path, a hub id or a loaded model"),
        (lambda model: model.lm_head, r"model_name = Linear\("),
        (lambda model: type(model), "model_name = <class"),
        (in_inference_mode, r"was made in torch\.inference_mode\(\)"),
        (
            lambda model: some_in_bfloat16(model, "model.layers.2", "model.layers.3"),
            r"float32 \(model\.embed.*\) and torch\.bfloat16 \(model\.layers\.2\..*one dtype",
        ),
        (lambda model: some_in_bfloat16(model, "lm_head"), r"bfloat16 \(lm_head\.weight\)"),
    ],
    ids=["number", "module", "class", "inference", "layers", "head"],
)
def test_a_loaded_model_that_cannot_be_changed_or_saved_is_refused_at_once(change, said, tmp_path):
    for call in (
        lambda model: open_model(model, device="cpu"),
        lambda model: shrink(model, tmp_path / "out", n=1),
    ):
        refuses(said, call, change(make("llama")))
    assert not [*tmp_path.iterdir()]


def test_a_model_whose_class_keeps_some_weights_in_float32_is_opened(tmp_path):
    made = make("deepseek_v3")
    if not getattr(made, "_keep_in_fp32_modules_strict", None):
        pytest.skip("transformers 4 keeps none of this family's weights in float32")
    made.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.float32}
    short = open_model(model)
    assert short.measure(random_windows(2, 9), progress=False).n_windows == 2
    short.remove_layers(DROP)
    short.save(tmp_path / "out")  # opened again and compared


def test_files_that_change_are_told_from_files_that_are_replaced(tmp_path):
    make("llama").save_pretrained(tmp_path / "hf")
    short, file = ShortHFModel(tmp_path / "hf"), tmp_path / "hf/model.safetensors"
    content = file.read_bytes()
    file.rename(tmp_path / "aside")
    file.write_bytes(content)
    short.save_pretrained(tmp_path / "out")  # the weights in memory are those of the former file
    file.unlink()
    short.save_pretrained(tmp_path / "again")
    other = ShortHFModel(tmp_path / "out")
    os.utime(tmp_path / "out/model.safetensors", ns=(0, 0))
    refuses("model.safetensors has changed since the", other.save_pretrained, tmp_path / "third")


def test_the_record_has_the_scores_that_chose_the_layers(tmp_path):
    short = ShortHFModel(make("llama"))
    read = random_windows(6, 12, vocab=90)
    short.measure(read, progress=False)
    chosen = short.importances.tolist()
    short.remove_layers(n=1)
    short.measure(read[:2], progress=False)
    short.save_pretrained(tmp_path / "out")
    record = Provenance.of_checkpoint(tmp_path / "out")
    assert [*record.block_influence] == chosen and record.scored["windows"] == 6


def test_weights_in_a_subfolder_are_opened_and_saved(tmp_path):
    make("llama").save_pretrained(tmp_path / "all/part")
    short = ShortHFModel(tmp_path / "all", subfolder="part")
    short.remove_layers([1])
    assert short.save_pretrained(tmp_path / "out").is_dir()

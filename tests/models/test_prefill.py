"""Layers skipped in the prompt alone: cached keys as by hand, decoding with all layers."""

from __future__ import annotations

import pytest
import torch
from conftest import BYTE_VOCAB, make_transformer, random_windows, save_byte_llama
from families import make
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from llama.formats.convert import meta_to_hf
from short_gpt.models.hf import HFDecoder
from short_gpt.models.meta import MetaDecoder
from short_gpt.models.prefill import skipped_in_prefill


def turned(x: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Keys (S, H, hd) at positions 0.., rotated as complex numbers: neighbours are a pair."""
    S, _, hd = x.shape
    frequency = theta ** (-torch.arange(0, hd, 2).double() / hd)
    angle = torch.arange(S).double()[:, None] * frequency
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(
        -2
    )


def prompt(size: int = 12) -> torch.Tensor:
    return torch.tensor(random_windows(1, size))


def decode(model, tokens, steps: int = 5) -> list[torch.Tensor]:
    """Logits of greedy steps after the prompt, with the cache of Meta's model."""
    logits, start, found = model(tokens, 0), tokens.shape[1], []
    for step in range(steps):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, start + step)
        found.append(logits[0, -1])
    return found


@torch.no_grad()
def test_without_a_layer_nothing_changes():
    model = make_transformer()
    expected = decode(model, prompt())
    with skipped_in_prefill(MetaDecoder(model), []):
        found = decode(model, prompt())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_the_skipped_layer_caches_rotated_keys():
    model = make_transformer()
    states = []
    model.layers[1].register_forward_hook(lambda _m, args, _o: states.append(args[0]))
    with skipped_in_prefill(MetaDecoder(model), [2]):
        model(prompt(), 0)
    layer = model.layers[2]
    model.layers[1]._forward_hooks.clear()
    behind = model.layers[1](states[0], None, model.freqs_cis[:12])
    keys = layer.attention.wk(layer.attention_norm(behind)).view(12, 2, 8)
    values = layer.attention.wv(layer.attention_norm(behind)).view(12, 2, 8)
    assert torch.allclose(layer.attention.cache_k[0, :12].double(), turned(keys), atol=1e-5)
    assert torch.equal(layer.attention.cache_v[0, :12], values)
    assert (turned(keys) - keys).abs().max() > 0.1  # the rotation is more than nothing


@torch.no_grad()
def test_the_prompt_passes_by_and_decoding_runs_all_layers():
    model, ran = make_transformer(), []
    decoder = MetaDecoder(model)
    expected = decode(model, prompt())
    for i, layer in enumerate(model.layers):
        layer.feed_forward.register_forward_hook(lambda *_, i=i: ran.append(i))
    with skipped_in_prefill(decoder, [1, 3]):
        model(prompt(), 0)
        assert ran == [0, 2, 4]
        ran.clear()
        model(prompt(1), 12)
        assert ran == [0, 1, 2, 3, 4]
        ran.clear()
        decoder.run(prompt())  # no cache, no prompt: scoring and perplexity see the whole model
        assert ran == [0, 1, 2, 3, 4]
        found = decode(model, prompt())
    assert not torch.allclose(found[0], expected[0])
    again = decode(model, prompt())
    assert torch.equal(again[0], expected[0])


@torch.no_grad()
def test_both_formats_decode_alike(tmp_path):
    model = make_transformer(vocab_size=BYTE_VOCAB)
    save_byte_llama(tmp_path / "meta", model)
    meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with (
        skipped_in_prefill(MetaDecoder(model), [1, 3]),
        skipped_in_prefill(HFDecoder(twin), [1, 3]),
    ):
        ours = decode(model, prompt())
        out = generate(twin, output_logits=True, return_dict_in_generate=True)
    for expected, found in zip(ours, out.logits[1:], strict=True):
        assert torch.allclose(found[0], expected, atol=1e-4)


def generate(model, **options):
    config = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    return model.generate(prompt(), **config, **options)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "granite"]
)
@torch.no_grad()
def test_families_generate_with_skipped_layers(family):
    model, ran, kept = make(family), [], []
    plain = generate(model)
    with skipped_in_prefill(HFDecoder(model), []):
        assert torch.equal(generate(model), plain)
    layers = HFDecoder(model).layers
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda _m, args, _o, i=i: ran.append((i, args[0].shape[1])))
        layer.self_attn.register_forward_hook(keep_cache(kept), with_kwargs=True)
    with skipped_in_prefill(HFDecoder(model), [1, 4]):
        ran.clear()  # how layers return is told by a run of one token
        kept.clear()
        generate(model)
    assert ran[:4] == [(0, 12), (2, 12), (3, 12), (5, 12)]
    assert ran[4:] == [(i, 1) for _ in range(5) for i in range(6)]
    assert all(kept[-1].get_seq_length(i) == 17 for i in range(6))
    ran.clear()
    HFDecoder(model).run(prompt())
    assert len(ran) == 6


def keep_cache(kept):
    def hook(module, args, kwargs, output):
        kept.extend(value for value in kwargs.values() if isinstance(value, Cache))

    return hook


def test_families_without_such_a_cache_are_refused():
    with (
        pytest.raises(ValueError, match="this family cannot skip layers in the prompt"),
        skipped_in_prefill(HFDecoder(make("mamba")), [1]),
    ):
        pass


def test_layers_that_do_not_exist():
    with (
        pytest.raises(ValueError, match=r"layers \[7\] do not exist; the model has 0..4"),
        skipped_in_prefill(MetaDecoder(make_transformer()), [7]),
    ):
        pass

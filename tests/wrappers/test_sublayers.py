"""Halves of layers taken out: the logits by hand, and a file that loads anywhere."""

from __future__ import annotations

import pytest
import torch
from conftest import make_transformer, random_windows
from families import make
from transformers import AutoModelForCausalLM

from short_gpt.models.hf import HFDecoder
from short_gpt.models.meta import MetaDecoder
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_model import remove_sublayers


@torch.no_grad()
def test_the_logits_are_those_of_layers_without_the_half():
    model, tokens = make_transformer(), torch.tensor(random_windows(1, 20))
    whole = model(tokens)
    h = model.tok_embeddings(tokens)
    for i, layer in enumerate(model.layers):
        if i != 1:
            h = h + layer.attention(layer.attention_norm(h), None, model.freqs_cis[:20], None)
        if i not in (1, 3):
            h = h + layer.feed_forward(layer.ffn_norm(h))
    undo = remove_sublayers(MetaDecoder(model), attention=[1], mlp=[3, 1])
    assert torch.allclose(model(tokens), model.head(h), atol=1e-5)
    undo()
    assert torch.equal(model(tokens), whole)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "starcoder2"])
def test_the_result_loads_in_plain_transformers(family, tmp_path):
    model = make(family)
    undo = remove_sublayers(HFDecoder(model), attention=[2], mlp=[4])
    tokens = torch.tensor(random_windows(1, 12))
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(tokens).logits, expected)
        undo()
        assert not torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "cohere", "gpt_neox", "granite", "mamba"])
def test_other_structures_are_refused(family):
    model, tokens = make(family), torch.tensor(random_windows(1, 12))
    for layer in HFDecoder(model).layers:
        layer.residual_multiplier = 0.5  # Granite's factor in front of the sum
    with torch.no_grad():
        before = model(tokens).logits
        with pytest.raises(
            ValueError, match="not x \\+ attention|no plain matrix|no single linear"
        ):
            remove_sublayers(HFDecoder(model), attention=[1])
        assert torch.equal(model(tokens).logits, before)


def test_only_what_adds_nothing_in_any_rounding_is_removed(monkeypatch):
    model, vecdot, more = make_transformer(), torch.linalg.vecdot, 0.0
    monkeypatch.setattr(torch.linalg, "vecdot", lambda *xy: vecdot(*xy) * (1 - 1e-5))  # as on a GPU
    model.layers[3].feed_forward.register_forward_hook(lambda _, __, out: out + more)
    remove_sublayers(MetaDecoder(model), attention=[3], mlp=[3])()
    tokens, more = torch.tensor(random_windows(1, 12)), 1e-4
    before = model(tokens)
    with pytest.raises(ValueError, match="the MLP of layer 3 adds more than its output proj"):
        remove_sublayers(MetaDecoder(model), attention=[3], mlp=[3])
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"attention": [5]}, r"layers \[5\] do not exist; the model has 0..4"),
        ({"mlp": [1, 1]}, r"layers \[1, 1\] name a layer twice"),
        ({}, "attention or MLP is to go, got none"),
    ],
)
def test_layers_are_checked(layers, message):
    with pytest.raises(ValueError, match=message):
        remove_sublayers(MetaDecoder(make_transformer()), **layers)


def test_weights_that_are_not_in_memory_are_refused():
    """As those of a streamed model are, but while their layer runs."""
    model = make_transformer()
    model.layers[1].to("meta")
    for half in ("attention", "mlp"):
        with pytest.raises(ValueError, match="not in memory: open the model without stream"):
            remove_sublayers(MetaDecoder(model), **{half: [1]})


def test_a_sublayer_that_a_healing_solved_again_is_back():
    short = ShortHFModel(make("llama"))
    short.remove_sublayers(attention=[3, 4], mlp=[3])
    assert short.removed_sublayers == {"attention": [3, 4], "mlp": [3]}
    size = short.model.config.hidden_size
    values = {(3, "self_attn.o_proj.weight"): torch.ones(size, size)}
    undo = short.change_weights({"method": "a test"}, values)
    assert short.removed_sublayers == {"attention": [4], "mlp": [3]}
    undo()
    assert short.removed_sublayers == {"attention": [3, 4], "mlp": [3]}

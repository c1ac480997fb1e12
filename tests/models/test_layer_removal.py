"""Surgery on live models: exact, complete, reversible."""

from __future__ import annotations

import pytest
import torch
from conftest import make_transformer, refuses

from short_gpt.models.decoder import MetaDecoder, remove_layers, without_layers
from short_gpt.models.numbering import span

TOKENS = torch.arange(3, 15)[None]


def test_removal_edits_every_place_and_undo_restores_them(transformer):
    decoder, layers = MetaDecoder(transformer), list(transformer.layers)
    logits = decoder.logits(TOKENS)
    undo = remove_layers(decoder, [3, 1])
    assert list(transformer.layers) == [layers[0], layers[2], layers[4]]
    assert transformer.n_layers == transformer.params.n_layers == 3
    assert [layer.layer_id for layer in transformer.layers] == [0, 1, 2]
    assert not torch.equal(decoder.logits(TOKENS), logits)
    undo()
    assert list(transformer.layers) == layers
    assert transformer.n_layers == transformer.params.n_layers == 5
    assert [layer.layer_id for layer in transformer.layers] == [0, 1, 2, 3, 4]
    assert torch.equal(decoder.logits(TOKENS), logits)


def test_removal_equals_a_model_built_without_the_layers(transformer):
    state = transformer.state_dict()
    smaller = make_transformer(n_layers=3)
    kept = {0: 0, 2: 1, 4: 2}
    renamed = {}
    for name, weight in state.items():
        parts = name.split(".")
        if parts[0] == "layers":
            if int(parts[1]) not in kept:
                continue
            parts[1] = str(kept[int(parts[1])])
        renamed[".".join(parts)] = weight
    smaller.load_state_dict(renamed)
    remove_layers(MetaDecoder(transformer), [1, 3])
    assert torch.equal(transformer(TOKENS), smaller(TOKENS))


def test_a_trial_gives_the_model_back_even_after_an_error(transformer):
    decoder = MetaDecoder(transformer)
    before = decoder.logits(TOKENS)
    with pytest.raises(KeyError), without_layers(decoder, [0]):
        assert len(decoder.layers) == 4
        raise KeyError
    assert torch.equal(decoder.logits(TOKENS), before)
    with without_layers(decoder, []):
        assert len(decoder.layers) == 5


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ([9], r"layers \[9\] do not exist; the model has 0..4"),
        ([-1], r"layers \[-1\] do not exist"),
        ([1, 1], "name a layer twice"),
        ([0, 1, 2, 3, 4], "layers to remove = 5; the model has 5 layers: expected 1 to 4"),
        ([], "number of layers to remove = 0"),
    ],
)
def test_bad_lists_change_nothing(transformer, drop, message):
    refuses(message, remove_layers, MetaDecoder(transformer), drop)
    assert len(transformer.layers) == 5


def test_span():
    assert span([0, 1, 2, 5, 7, 8]) == "0..2, 5, 7, 8"

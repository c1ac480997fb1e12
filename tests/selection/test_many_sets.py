"""Many sets at once: the losses of each alone, for fewer layers run."""

from __future__ import annotations

import itertools

import pytest
from conftest import make_transformer, random_windows

from llama.model import TransformerBlock
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.models.decoder import pad
from short_gpt.models.layer_removal import without_layers
from short_gpt.models.meta import MetaDecoder
from short_gpt.selection.many_sets import ManySets

WINDOWS = random_windows(2, 16)
SETS = [*itertools.combinations((1, 2, 3, 5), 2), (0, 6), (1, 2, 3, 5)]


def test_losses_are_those_of_each_set_alone_for_half_of_the_layers(monkeypatch):
    decoder, expected = MetaDecoder(make_transformer(n_layers=7)), []
    for layers in SETS:
        with without_layers(decoder, layers):
            expected.append(perplexity(decoder, [WINDOWS]).nats)
    many, ran, plain = ManySets(decoder, SETS), [], TransformerBlock.forward
    monkeypatch.setattr(TransformerBlock, "forward", lambda *args: ran.append(0) or plain(*args))
    found = many.nats(*pad(WINDOWS, decoder))
    assert [found[s] for s in SETS] == pytest.approx(expected, rel=1e-6)
    assert len(ran) < 0.8 * sum(7 - len(layers) for layers in SETS)

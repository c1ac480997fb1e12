"""A layer that is not computed again where what its attention's matrix is given is known."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows
from families import make

from short_gpt.healing.refit import fit
from short_gpt.healing.refit_layer import KnownAttention, LayerRefit
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.sublayers import Sublayers
from short_gpt.wrappers.short_hf import ShortHFModel

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

WINDOWS, HELD = random_windows(6, 16), random_windows(2, 16, seed=5)
# tuples and tensors, parallel blocks, another layout of the matrix, norms behind
KNOWN = ["llama", "gpt2", "falcon", "phi", "bloom", "gemma2", "olmo2", "granite"]


@pytest.mark.parametrize("family", KNOWN)
def test_the_refit_is_what_it_is_where_layers_run_whole(family, monkeypatch):
    known = fit(ShortHFModel(make(family)), [3], WINDOWS, held=HELD, progress=False)
    monkeypatch.setattr(
        KnownAttention, "proved", property(lambda _: False, lambda *_: None), raising=False
    )
    whole = fit(ShortHFModel(make(family)), [3], WINDOWS, held=HELD, progress=False)
    assert known.values.keys() == whole.values.keys() and known.values
    for key, value in known.values.items():
        assert torch.allclose(value, whole.values[key], atol=1e-4)


def test_behind_its_solution_an_attention_is_not_computed_again(monkeypatch):
    short, calls, inside = ShortHFModel(make("llama")), [], []
    for layer in short.decoder.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(len(inside)))
    plain = LayerRefit._read_mlp

    def read_mlp(layer, *args):
        inside.append(layer)
        yield from plain(layer, *args)
        inside.pop()

    monkeypatch.setattr(LayerRefit, "_read_mlp", read_mlp)
    fit(short, [3], WINDOWS, held=HELD, progress=False)
    assert calls and not any(calls)


def test_an_attention_that_gives_more_than_its_matrix_is_not_taken_for_known():
    short = ShortHFModel(make("llama"))
    calls = LayerCalls(short.decoder)
    state = calls.embed(torch.tensor(WINDOWS[:1]))
    end = Sublayers.of(calls, 0, state, short.decoder.family).projections["attention"]
    assert KnownAttention(calls, 0, end, state).proved
    attention = short.decoder.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: (plain(*args, **kwargs)[0] + 1, None)
    assert not KnownAttention(calls, 0, end, state).proved

"""What a cache holds is what transformers' own holds once a model has read a long text."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, HEAD, LAYERS, PLAIN, make
from transformers import AutoConfig, AutoModelForCausalLM

from short_gpt.models.hf import CACHES, HFDecoder, layer_caches

CONTEXT, WINDOW = 24, 8  # tokens; most of a text is outside of the window
STATES = ("keys", "values", "conv_states", "recurrent_states")
BEFORE = ("key_cache", "value_cache", "conv_states", "ssm_states", "recurrent_states", "conv_cache")
CPU = torch.device("cpu")


def held(model, batch: int) -> int:
    """Bytes of the cache of transformers, in each of its layouts."""
    with torch.no_grad():
        output = model(torch.arange(CONTEXT)[None].expand(batch, -1) + 3, use_cache=True)
    cache = next(output[name] for name in CACHES if name in output)
    parts = [vars(layer) for layer in getattr(cache, "layers", ())] or [vars(cache)]
    states = [part.get(name) for part in parts for name in {*STATES, *BEFORE}]
    several = [s.values() if isinstance(s, dict) else s for s in states if s is not None]
    tensors = [t for s in several for t in ([s] if isinstance(s, torch.Tensor) else s)]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_transformers_own(family):
    model = make(family)
    for dtype in (torch.float32, torch.bfloat16):
        caches = layer_caches(model.to(dtype), LAYERS, CPU)
        assert len(caches) == LAYERS
        assert 3 * sum(own.size(CONTEXT, dtype.itemsize) for own in caches) == held(model, 3)


def test_layers_with_a_window_hold_less_than_others():
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {**PLAIN, **HEAD, "sliding_window": WINDOW, "layer_types": kinds}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **sizes))
    # keys and values of 2 heads of 8; the next token makes the window full
    numbers = {"sliding_attention": 2 * 2 * 8 * (WINDOW - 1), "full_attention": 2 * 2 * 8 * CONTEXT}
    for kind, own in zip(kinds, layer_caches(model, LAYERS, CPU), strict=True):
        assert own.size(CONTEXT, 2) == 2 * numbers[kind]
        assert own.size(WINDOW - 2, 2) == 2 * 2 * 2 * 8 * (WINDOW - 2)
    HFDecoder(model).keep_layers([0, 1, 2, 4])
    held = [own.most for own in layer_caches(model, 4, CPU)]
    assert held == [WINDOW - 1, None, WINDOW - 1, WINDOW - 1]

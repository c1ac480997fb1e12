"""A model whose rotary factors depend on a batch's longest window gives what it gives alone."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows, refuses
from transformers import AutoConfig, AutoModelForCausalLM

from short_gpt import ShortHFModel
from short_gpt.models.decoder import pad, same_rotary_groups
from short_gpt.models.layer_config import longrope_limits

SHORT, LONG = random_windows(1, 12)[0], random_windows(1, 30, seed=1)[0]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}


def short_hf(family: str, rope: dict[str, object], **changes: object) -> ShortHFModel:
    """A random model whose attention has something to tell by positions."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, rope_scaling=rope, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(10)
    return ShortHFModel(model)


@pytest.fixture(scope="module")
def phi3() -> ShortHFModel:
    return short_hf("phi3", LONGROPE, original_max_position_embeddings=16)


def test_scores_of_a_mixed_batch_are_those_alone(phi3):
    windows = [SHORT, LONG, SHORT[:9], LONG[::-1]]
    mixed = phi3.score_batch(windows)
    for place, window in enumerate(windows):
        alone = phi3.score_batch([window])
        for name, values in vars(alone).items():
            assert torch.allclose(getattr(mixed, name)[place], values[0], atol=1e-5), name


def test_a_mixed_batch_has_the_perplexity_of_its_windows_alone(phi3):
    windows = [SHORT, LONG, SHORT[:9]]
    alone = sum(phi3.perplexity([window], progress=False).nats for window in windows)
    assert phi3.perplexity(windows, batch_size=3, progress=False).nats == pytest.approx(alone)
    found = [
        phi3.search(windows, 1, method="perplexity", batch_size=size, progress=False).losses[0]
        for size in (1, 3)
    ]
    assert found[0] == pytest.approx(found[1])


def test_transformers_own_batch_is_what_differs(phi3):
    with torch.no_grad():
        ids = torch.tensor([SHORT + [0] * 18, LONG])
        together = phi3.model(input_ids=ids).logits[0, : len(SHORT)]
        alone = phi3.model(input_ids=ids[:1, : len(SHORT)]).logits[0]
    assert (together - alone).abs().max() > 1e-2


def test_windows_on_both_sides_of_the_limit_are_no_batch(phi3):
    assert same_rotary_groups([SHORT, LONG, SHORT], phi3.decoder) == [[0, 2], [1]]
    refuses(r"12 to 30 tokens; .* change beyond \[16\]: set", pad, [SHORT, LONG], phi3.decoder)
    assert pad([SHORT, SHORT[:16]], phi3.decoder)[0].shape == (2, 12)


def test_which_models_have_a_limit(phi3):
    assert phi3.decoder.rotary_limits == [16]
    kinds = {"full_attention": {**LONGROPE, "original_max_position_embeddings": 8}}
    config = AutoConfig.for_model("llama", max_position_embeddings=64)
    config.rope_parameters = {**kinds, "sliding_attention": {"rope_type": "default"}}
    assert longrope_limits(config) == [8]
    assert longrope_limits(AutoConfig.for_model("gpt2")) == []


def test_dynamic_factors_change_beyond_the_longest_window_alone():
    short = short_hf("llama", {"rope_type": "dynamic", "factor": 2.0})
    edge = random_windows(1, 64, seed=2)[0]  # as long as is allowed
    alone = short.score_batch([SHORT]).influence[0]
    assert torch.allclose(short.score_batch([SHORT, edge]).influence[0], alone, atol=1e-5)
    refuses("this model takes 1 to 64", short.score_batch, [SHORT, [*edge, 1]])

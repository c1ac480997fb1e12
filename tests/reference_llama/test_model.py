"""The Transformer against transformers' Llama, and against itself in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import refuses

from llama.args import ModelArgs
from llama.model import RMSNorm, apply_rotary_emb, precompute_freqs_cis, rope_frequencies


def test_prefill_equals_step_by_step(transformer):
    tokens = torch.randint(0, 96, (3, 20))
    with torch.no_grad():
        whole = transformer(tokens)
        steps = torch.cat([transformer(tokens[:, i : i + 1], i) for i in range(20)], dim=1)
        chunks = torch.cat(
            [transformer(tokens[:, a:b], a) for a, b in ((0, 7), (7, 8), (8, 20))], dim=1
        )
    assert (steps - whole).abs().max() < 1e-5
    assert (chunks - whole).abs().max() < 1e-5


def test_a_full_pass_leaves_no_cache_and_a_cached_one_goes_with_its_layer(transformer):
    tokens = torch.randint(0, 96, (1, 5))
    transformer(tokens)
    assert all(layer.attention.cache_k is None for layer in transformer.layers)
    transformer(tokens, 0)
    assert all(layer.attention.cache_k.shape == (1, 64, 2, 8) for layer in transformer.layers)
    assert not any("cache" in name for name in transformer.state_dict())


def test_the_cache_can_be_used_after_gradients_and_grows_with_the_batch(transformer):
    one, three = torch.randint(0, 96, (1, 5)), torch.randint(0, 96, (3, 5))
    transformer(one, 0)
    transformer(three, 0).sum().backward()
    with torch.no_grad():
        whole = transformer(one)
        transformer(one[:, :4], 0)
        last = transformer(one[:, 4:], 4)
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_a_cache_of_inference_mode_is_made_anew_outside(transformer):
    tokens = torch.randint(0, 96, (1, 5))
    with torch.inference_mode():
        transformer(tokens, 0)
    with torch.no_grad():
        assert torch.allclose(transformer(tokens, 0), transformer(tokens), atol=1e-5)


@pytest.fixture
def seen(monkeypatch):
    """The mask of every call of torch's attention, and whether it is causal by itself."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*args, attn_mask, is_causal, **kwargs):
        calls.append((attn_mask, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    return calls


def test_a_full_pass_builds_no_mask(transformer, seen):
    transformer(torch.randint(0, 96, (2, 9)))
    transformer(torch.randint(0, 96, (2, 9)), 0)
    assert seen == [(None, True)] * 10


def test_continuing_what_never_began_is_refused(transformer):
    refuses("= 3: expected 0 first: 1", transformer, torch.zeros(1, 1, dtype=torch.long), 3)


def test_what_the_cache_holds_of_another_text_is_not_read(transformer):
    tokens = torch.randint(0, 96, (3, 20))

    def run(rows, start, end):
        with torch.no_grad():
            return transformer(tokens[:rows, start:end], start)

    run(3, 0, 20)
    run(1, 0, 5)  # the other two rows are of the text before
    refuses("start_pos = 5: expected 0 first: 3 rows", run, 3, 5, 6)
    with pytest.raises(ValueError, match="start_pos = 6: expected 0 first: 1 rows"):
        run(1, 6, 7)  # a gap
    run(3, 0, 8)
    run(2, 8, 9)
    refuses("start_pos = 9: expected 0 first: 3 rows", run, 3, 9, 10)
    with torch.no_grad():
        whole = transformer(tokens)
    for rows, start, end in ((3, 8, 12), (2, 12, 13), (1, 10, 14), (3, 5, 20)):  # from what was run
        assert torch.allclose(run(rows, start, end), whole[:rows, start:end], atol=1e-5)
    run(3, 5, 6)
    with pytest.raises(ValueError, match="start_pos = 20: expected 0 first: 3 rows"):
        run(3, 20, 21)  # behind a text that began to differ at position 5


def test_too_many_positions_are_refused(transformer):
    for start_pos, size, limit in ((None, 129, 128), (0, 65, 64)):
        with pytest.raises(ValueError, match=f"positions = {size}: expected at most {limit}"):
            transformer(torch.zeros(1, size, dtype=torch.long), start_pos)


def test_rms_norm_rounds_before_the_weight_as_the_reference_does():
    torch.manual_seed(0)
    norm, x = RMSNorm(64).bfloat16(), 3 * torch.randn(8, 64).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    assert torch.equal(norm(x), normalized.type_as(x) * norm.weight)
    assert not torch.equal(norm(x), (normalized * norm.weight.float()).type_as(x))
    assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_rms_norm_of_large_float16_states_is_finite(size):
    """Massive activations: their squares are beyond float16's 65504."""
    x = torch.full((1, 64), size, dtype=torch.float16)
    x[:, ::2] *= -1
    assert torch.equal(RMSNorm(64).half()(x), x.sign())


def test_rotation_turns_neighbours_by_position_times_frequency():
    args = ModelArgs(dim=4, n_heads=1, rope_theta=10000.0)
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(3, 4)[None, :, None]  # (1, 3, 1, 4)
    turned = apply_rotary_emb(x, precompute_freqs_cis(args, 3))[0, 2, 0]
    expected = [math.cos(2), math.sin(2), math.cos(0.02), math.sin(0.02)]
    assert turned.tolist() == pytest.approx(expected, abs=1e-6)


# Values computed from the formula of Llama 3.1's reference in float64, theta 500000.
@pytest.mark.parametrize(
    ("head_dim", "factor", "expected"),
    [
        (128, 8.0, {29: 0.002166570763503359, 34: 0.00017850781276799638}),
        (128, 8.0, {35: 9.556212353964683e-05, 63: 3.068925988914511e-07}),
        (64, 32.0, {15: 0.001290547928209264, 17: 9.70828780262767e-05}),
        (64, 32.0, {18: 1.9461638184831125e-05, 31: 9.418306725434909e-08}),
        (128, 32.0, {29: 0.002118406996779608, 63: 7.672314972286278e-08}),
    ],
)
def test_scaled_rope_frequencies(head_dim, factor, expected):
    found = rope_frequencies(head_dim, 500000.0, factor)
    plain = rope_frequencies(head_dim, 500000.0)
    for index, value in expected.items():
        assert found[index].item() == pytest.approx(value, rel=2e-6)
    assert torch.equal(found[:14], plain[:14])


def test_the_scaling_factor_is_32_for_the_small_llama_3_2_models():
    def factor(dim: int, **more: object) -> float | None:
        return ModelArgs(dim=dim, use_scaled_rope=True, **more).rope_factor

    assert (factor(4096), factor(2048), factor(3072)) == (8.0, 32.0, 32.0)
    assert factor(2048, rope_scaling_factor=4.0) == 4.0
    assert ModelArgs(dim=2048).rope_factor is None


def test_gradients_reach_every_weight(transformer):
    transformer(torch.randint(0, 96, (1, 9))).square().mean().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in transformer.parameters())


def test_the_mask_that_some_devices_need_is_the_causal_one(transformer, seen, monkeypatch):
    tokens = torch.randint(0, 96, (2, 9))
    expected = transformer(tokens)
    seen.clear()
    monkeypatch.setattr("llama.model.MASKED", ("cpu",))
    assert torch.allclose(transformer(tokens), expected, atol=1e-5)
    assert [is_causal for _, is_causal in seen] == [False] * 5

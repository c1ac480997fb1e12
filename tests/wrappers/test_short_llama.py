"""The wrapper as scripts use it: score, look, remove, save; and every misuse."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CharTokenizer,
    make_transformer,
    random_windows,
    refuses,
    save_byte_llama,
    save_checkpoint,
    zero_layer,
)
from scipy.stats import spearmanr
from torch import nn

from llama import Llama
from short_gpt import ShortLlama, heal_refit
from short_gpt.models.decoder import MetaDecoder, remove_layers, without_layers
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.run import measure


@pytest.fixture
def short() -> ShortLlama:
    return ShortLlama(Llama(make_transformer(), CharTokenizer()), n_prune_layers=2)


WINDOWS = random_windows(6, 20)


def test_the_whole_story(short):
    for window in WINDOWS:
        short.eval_importance([window])
    assert short.importances.shape == (5,)
    assert (short.n_windows, short.importance.n_tokens) == (6, 120)
    each = []
    for window in WINDOWS:
        one = ShortLlama(Llama(make_transformer(), CharTokenizer()))
        one.eval_importance([window])
        each.append(one.importances)
    means = torch.stack(each)
    assert torch.allclose(short.importances, means.mean(0), rtol=1e-5)
    assert torch.allclose(short.importance.standard_error, means.std(0) / 6**0.5, rtol=1e-4)
    halves = spearmanr(means[0::2].mean(0), means[1::2].mean(0)).statistic
    assert short.importance.agreement == pytest.approx(halves)
    assert short.importance.angular.shape == (6, 6)
    expected = short.importances.argsort()[:2].tolist()
    assert short.remove_layers() == expected
    assert short.removed == expected
    assert short.kept == sorted(set(range(5)) - set(expected))
    assert len(short.llama.model.layers) == 3
    assert short.importances.shape == (5,)  # still those of the model that was scored
    assert short.llama.text_completion(["abc"], temperature=0, max_gen_len=5)[0]["generation"]


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("position", range(5))
def test_an_identity_layer_goes_first_and_leaves_no_trace(angular, position):
    llama = Llama(make_transformer(), CharTokenizer())
    zero_layer(llama.model, position)
    before = llama.model(torch.tensor(WINDOWS))
    short = ShortLlama(llama, n_prune_layers=1)
    short.eval_importance(WINDOWS[:3])
    assert short.importances[position] < 1e-6
    assert short.remove_layers(angular=angular) == [position]
    assert torch.equal(llama.model(torch.tensor(WINDOWS)), before)


def test_layer_numbers_stay_the_original_ones(short):
    assert short.remove_layers([1]) == [1]
    short.eval_importance(WINDOWS[:4])
    assert short.importances[1].isnan()
    cut = make_transformer()
    remove_layers(MetaDecoder(cut), [1])
    scores = measure(MetaDecoder(cut), [WINDOWS[:4]]).block_influence
    assert torch.allclose(short.importances[[0, 2, 3, 4]], scores, rtol=1e-6)
    lowest = [i for i in short.importances.argsort().tolist() if i != 1][:2]
    assert short.remove_layers() == lowest
    assert short.removed == [1, *lowest]
    refuses(r"layers \[1\] do not exist", short.remove_layers, [1])


def test_generated_tokens_are_scored_with_the_prompt(short):
    prompts = [WINDOWS[0][:5], WINDOWS[1][:9]]
    short.llama.tokenizer.stop_tokens = frozenset({95})
    generated, _ = short.llama.generate(prompts, 6, temperature=0, echo=True)
    short.eval_importance(prompts, max_gen_len=6, temperature=0)
    assert short.importance.n_tokens == sum(len(g) for g in generated) > 14
    other = ShortLlama(short.llama)
    other.eval_importance(generated)
    assert torch.equal(short.importances, other.importances)


def unchanged(short: ShortLlama) -> bool:
    return len(short.decoder.layers) == 5 and short.kept == [0, 1, 2, 3, 4] and not short.removed


def test_removing_before_scoring_is_refused(short):
    refuses("no scores yet; call eval_importance", short.remove_layers)
    with pytest.raises(ShortGPTError, match="no scores yet"):
        _ = short.importances
    assert unchanged(short)


def test_removing_twice_on_the_same_scores_is_refused(short):
    short.eval_importance(WINDOWS[:2])
    first = short.remove_layers()
    refuses("removed since these scores were measured; score", short.remove_layers)
    assert short.removed == first and len(short.decoder.layers) == 3
    short.eval_importance(WINDOWS[:2])
    assert len(short.remove_layers()) == 2


@pytest.mark.parametrize("n", [0, 5, -1, 2.5, True, "2"])
def test_n_out_of_range_is_refused(short, n):
    message = f"n_prune_layers = {n!r}; the model has 5 layers: expected 1 to 4"
    refuses(re.escape(message), ShortLlama, short.llama, n_prune_layers=n)
    short.eval_importance(WINDOWS[:1])
    short.n_prune_layers = n
    refuses(re.escape(message), short.remove_layers)
    assert unchanged(short)


def test_nothing_to_score_is_refused(short):
    refuses("expected at least one window of tokens, got none", short.eval_importance, [])
    for layers in ([1.5], ["1"], np.int64(1), 1.0):
        refuses("expected a list of layer numbers, got ", short.remove_layers, layers)
    assert unchanged(short)
    short.eval_importance(WINDOWS)
    with pytest.raises(ValueError, match="expected at least one window of tokens, got none"):
        short.eval_importance([])  # nor are earlier scores taken for its own


def test_one_window_is_no_list_of_windows(short):
    for window in ([1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3])):
        refuses("expected at least one window of tokens", short.score_batch, window)
        refuses("expected at least one window of tokens", short.measure, window, progress=False)
    windows = torch.tensor(WINDOWS)
    assert torch.equal(short.score_batch(windows).influence, short.score_batch(WINDOWS).influence)
    assert torch.equal(
        short.score_batch(windows.numpy()).influence, short.score_batch(WINDOWS).influence
    )


def test_inside_a_trial_nothing_is_scored_or_removed(short):
    with without_layers(short.decoder, [0]):
        for act in (lambda: short.eval_importance(WINDOWS[:1]), lambda: short.remove_layers([1])):
            refuses("the model has 4 layers, expected 5", act)
        assert short.perplexity(WINDOWS[:1], progress=False).tokens == 19
    assert unchanged(short)


def test_scores_outlive_a_failed_measurement_after_a_removal(short):
    short.eval_importance(WINDOWS[:2])
    before = short.importances.clone()
    short.remove_layers()
    refuses("outside the vocabulary", short.eval_importance, [[5000]])
    assert torch.equal(short.importances, before)


def test_a_model_cut_before_it_was_wrapped_is_not_saved(short, tmp_path):
    save_checkpoint(tmp_path / "source", make_transformer())
    short.remove_layers([1])
    again = ShortLlama(short.llama)
    again.remove_layers([2])
    refuses("5 layers, .* began with 4", again.save, tmp_path / "out", ckpt_dir=tmp_path / "source")


def test_a_changed_model_is_not_saved_inside_a_trial(short, tmp_path):
    save_checkpoint(tmp_path / "source", make_transformer())
    short.change_weights({"method": "by hand"}, {(3, "feed_forward.w2.weight"): torch.ones(32, 96)})
    with short.without_layers([1]), pytest.raises(ShortGPTError, match="has 4 layers, expected 5"):
        short.save(tmp_path / "out", ckpt_dir=tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_found_before_attention_hides_them(short):
    with torch.no_grad():
        short.llama.model.layers[2].attention.wq.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"has NaN .* layer 2 in attention\.wq\.weight"):
        short.eval_importance(WINDOWS[:1])


def test_perplexity_of_uniform_logits_is_the_vocabulary(short):
    with torch.no_grad():
        short.llama.model.output.weight.zero_()
    found = short.perplexity(WINDOWS, batch_size=4, progress=False)
    assert found.value == pytest.approx(96, rel=1e-5)
    assert (found.tokens, found.windows) == (6 * 19, 6)


def test_saving_needs_a_source_and_something_removed(short, tmp_path):
    refuses("pass ckpt_dir", short.save, tmp_path / "out")
    refuses("nothing was removed yet", short.save, tmp_path / "out", ckpt_dir=tmp_path)


class ReferenceAttention(nn.Module):
    """Our weights; keys and values are always cached, in a fixed batch of 4."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = ours.wq, ours.wk, ours.wv, ours.wo
        self.size, self.n_rep = ours.head_dim, ours.n_rep
        shape = (4, 64, ours.n_local_kv_heads, self.size)
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def turned(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, S, H, hd / 2)
        return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).type_as(x)

    def forward(self, x, start_pos, freqs_cis, mask):
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, self.size) for w in (self.wq, self.wk, self.wv))
        end = start_pos + S
        self.cache_k[:B, start_pos:end] = self.turned(k, freqs_cis)
        self.cache_v[:B, start_pos:end] = v
        k, v = (
            cache[:B, :end].repeat_interleave(self.n_rep, dim=2).transpose(1, 2)
            for cache in (self.cache_k, self.cache_v)
        )  # (B, H, T, hd)
        scores = self.turned(q, freqs_cis).transpose(1, 2) @ k.transpose(2, 3) / self.size**0.5
        scores = scores if mask is None else scores + mask
        out = scores.float().softmax(-1).type_as(q) @ v
        return self.wo(out.transpose(1, 2).reshape(B, S, -1))


class ReferenceBlock(nn.Module):
    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = ReferenceAttention(ours.attention), ours.feed_forward
        self.attention_norm, self.ffn_norm = ours.attention_norm, ours.ffn_norm

    def forward(self, x, start_pos, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class ReferenceShaped(nn.Module):
    """A model with the surface of Meta's reference package: complex rotations, caches on a
    fixed batch, an additive mask, no way around the head."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.params = SimpleNamespace(max_seq_len=64, n_layers=5)
        self.vocab_size, self.n_layers = 96, 5
        self.tok_embeddings, self.norm, self.output = ours.tok_embeddings, ours.norm, ours.output
        self.layers = nn.ModuleList(map(ReferenceBlock, ours.layers))
        self.freqs_cis = torch.view_as_complex(ours.freqs_cis)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        S, mask = tokens.shape[1], None
        if S > 1:
            mask = torch.full((S, S), float("-inf")).triu(1)
            mask = torch.hstack([torch.zeros(S, start_pos), mask])
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, start_pos, self.freqs_cis[start_pos : start_pos + S], mask)
        return self.output(self.norm(h)).float()


def likeliest(seen: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    return choose


def test_an_object_of_the_reference_package_works_too(short):
    reference = SimpleNamespace(
        model=ReferenceShaped(make_transformer()), tokenizer=CharTokenizer()
    )
    theirs = ShortLlama(reference, n_prune_layers=2)
    for wrapper in (short, theirs):
        wrapper.eval_importance(WINDOWS[:3])
    assert torch.allclose(theirs.importances, short.importances, atol=1e-6)
    assert torch.allclose(theirs.importance.angular, short.importance.angular, atol=1e-5)
    ours = short.perplexity(WINDOWS, progress=False).value
    assert theirs.perplexity(WINDOWS, progress=False).value == pytest.approx(ours, rel=1e-5)
    expected = short.greedy(WINDOWS[0], 9)
    assert [theirs.greedy(WINDOWS[0], 9, use_cache=c) for c in (True, False)] == [expected] * 2
    both: list[list[torch.Tensor]] = [[], []]  # the logits of every step
    for wrapper, seen in zip((short, theirs), both, strict=True):
        wrapper.continued(WINDOWS[:3], 9, likeliest(seen))
    assert len(both[0]) == 9
    assert torch.allclose(*map(torch.stack, both), atol=1e-4)
    assert theirs.remove_layers() == short.remove_layers()
    assert reference.model.n_layers == reference.model.params.n_layers == 3


def test_a_search_and_methods_name_original_layers(short):
    windows = random_windows(3, 20)
    short.remove_layers([2])
    found = short.search(windows, 2, progress=False)
    assert set(found.losses[0]) == {1, 3} and set(found.removed) == {1, 3}
    one_shot = short.search(windows, 1, method="perplexity", progress=False)
    assert set(one_shot.losses[0]) == {0, 1, 3, 4}
    short.measure(windows, progress=False)
    assert short.layers_to_remove(n=2, method="deepest") == [1, 3]
    refuses("method = 'bi': expected one of perplexity", short.search, windows, 1, method="bi")


def test_numbers_of_numpy_and_torch_name_layers_everywhere(short):
    for make in (np.array, torch.tensor):
        with short.without_layers(make([1, 3])):
            assert short.present == [0, 2, 4]
        with short.without_layers(make([0])):
            assert short.present == [1, 2, 3, 4]
    heal_refit(short, np.array([1, 3]), random_windows(9, 12), progress=False)
    assert short.removed == [1, 3] and type(short.removed[0]) is int


def test_a_model_of_one_layer_prints_its_scores(short):
    short.remove_layers([1, 2, 3, 4])
    short.measure(WINDOWS, progress=False)
    assert repr(short.importance) == "Importance(1 layers, 6 windows, 120 tokens)"


def test_caches_of_many_texts_go_after_an_error_too(short):
    def fails(logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short.continued(WINDOWS[:3], 9, fails)
    assert all(layer.attention.cache_k is None for layer in short.decoder.layers)


def test_a_source_that_changed_is_not_copied(tmp_path):
    source = save_byte_llama(tmp_path / "ckpt")
    short = ShortLlama.from_checkpoint(source, device="cpu")
    short.remove_layers([1])
    os.utime(source / "consolidated.00.pth", ns=(0, 0))
    refuses("consolidated.00.pth has changed since the model was", short.save, tmp_path / "out")
    assert short.save(tmp_path / "out", ckpt_dir=source).is_dir()  # the caller's word


def test_a_model_is_saved_over_its_own_source_again_and_again(tmp_path):
    short = ShortLlama.from_checkpoint(save_byte_llama(tmp_path / "ckpt"), device="cpu")
    short.remove_layers([1])
    short.save(tmp_path / "out")
    short = ShortLlama.from_checkpoint(tmp_path / "out", device="cpu")
    for value in (0.5, 0.25):
        weight = torch.full_like(short.decoder.layers[0].feed_forward.w2.weight, value)
        short.change_weights({"method": "by hand"}, {(0, "feed_forward.w2.weight"): weight})
        short.save(tmp_path / "out", overwrite=True)
        again = ShortLlama.from_checkpoint(tmp_path / "out", device="cpu")
        assert torch.equal(again.decoder.layers[0].feed_forward.w2.weight, weight)


def test_a_model_whose_files_are_gone_is_wrapped(tmp_path):
    source = save_byte_llama(tmp_path / "ckpt")
    llama = Llama.build(source, source / "tokenizer.json", 16, 1, device="cpu")
    shutil.rmtree(source)
    assert ShortLlama(llama).score_batch([[3, 4, 5]]).influence.isfinite().all()

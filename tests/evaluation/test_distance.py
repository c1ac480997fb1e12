"""Distance from the original model, against plain PyTorch in float64 over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_windows, short_llama
from families import FAMILIES, make
from torch import Tensor
from torch.nn.functional import kl_div

from short_gpt import ShortLlama
from short_gpt.data.windows import Answer, Window, batches
from short_gpt.evaluation.distance import Reference, kl_divergence
from short_gpt.evaluation.perplexity import (
    Mean,
    combined,
    difference,
    perplexity,
    sampling_error,
    window_perplexities,
)
from short_gpt.models.decoder import without_layers
from short_gpt.models.hf import HFDecoder
from short_gpt.selection import search
from short_gpt.selection.search import SearchOptions, by_loss


def short(layers: int = 5, *identities: int) -> ShortLlama:
    return short_llama(n_layers=layers, identities=identities)


def by_hand(logits: Tensor, original: Tensor, start: int = 1) -> tuple[Tensor, Tensor]:
    """Divergence and equality of the likeliest token of a window's predictions, from (1, S, V)."""
    log_q, log_p = (x[0, start - 1 : -1].double().log_softmax(-1) for x in (logits, original))
    each = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # (S - start,)
    return each, log_q.argmax(-1) == log_p.argmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_as_far_from_the_original_as_its_plain_logits_say(family):
    decoder = HFDecoder(make(family))
    windows = random_windows(3, 12, vocab=min(decoder.vocab_size, 96))
    reference = Reference(decoder)
    reference.read(windows)
    originals = [decoder.logits(torch.tensor([w])) for w in windows]
    for window, logits in zip(windows, originals, strict=True):
        assert torch.equal(reference.logits([window], len(window)), logits)
    try:
        undo = decoder.keep_layers([0, *range(2, len(decoder.layers))])
    except ValueError as error:  # a family whose layers this version cannot remove
        pytest.skip(str(error))
    found = perplexity(decoder, [windows], reference=reference)
    pairs = zip(windows, originals, strict=True)
    each = [by_hand(decoder.logits(torch.tensor([w])), original) for w, original in pairs]
    undo()
    assert found.kld.value == pytest.approx(float(torch.cat([k for k, _ in each]).mean()), abs=1e-6)
    assert found.same_top.value == float(torch.cat([same for _, same in each]).double().mean())
    assert found.kld.value > 1e-5


def test_the_prompt_of_an_answer_is_only_read():
    model, start = short(), 4
    counted = bytes(start) + b"\1" * (12 - start)
    window = Answer(random_windows(1, 12)[0], text=0, counted=counted)
    reference = model.reference([window])
    (original,) = model.window_logits([window])
    with model.without_layers([2]):
        (logits,) = model.window_logits([window])
        (found,) = model.window_perplexities([window], progress=False, reference=reference)
    kld, same = by_hand(logits[None], original[None], start)
    assert found.tokens == 12 - start == len(kld)
    assert found.kld.value == pytest.approx(float(kld.mean()), abs=1e-6)
    assert found.same_top.value == float(same.double().mean())
    nats = -logits.double().log_softmax(-1)[range(start - 1, 11), window[start:]]
    assert found.nats == pytest.approx(float(nats.sum()), abs=1e-4)


def test_windows_of_any_lengths_give_the_same_alone_and_in_batches():
    model = short()
    windows = [w[:length] for w, length in zip(random_windows(4, 20), (20, 3, 11, 2), strict=True)]
    reference = model.reference(windows)
    with model.without_layers([1, 3]):
        alone = combined(window_perplexities(model.decoder, windows, reference=reference))
        padded = perplexity(model.decoder, batches(windows, 4), reference=reference)
    for name in ("kld", "same_top"):
        one, other = getattr(alone, name), getattr(padded, name)
        assert one.value == pytest.approx(other.value, abs=1e-6)
        assert one.error.standard_error == pytest.approx(other.error.standard_error, abs=1e-6)


def test_a_model_without_an_identity_is_at_no_distance_and_all_its_top_tokens_are_equal():
    model = short(5, 3)
    windows = random_windows(3, 10)
    reference = model.reference(windows)
    with model.without_layers([3]):
        found = perplexity(model.decoder, [windows], reference=reference)
    assert (found.kld.value, found.same_top.value) == (0.0, 1.0)
    assert perplexity(model.decoder, [windows]).kld is None


def test_tokens_that_both_models_exclude_add_nothing():
    logits, original = torch.tensor([[[0.0, 1.0, -torch.inf]], [[1.0, 0.5, -torch.inf]]])
    own, other = (x[:, :2].log_softmax(-1) for x in (logits, original))
    expected = kl_div(own, other, reduction="sum", log_target=True)
    assert kl_divergence(logits, original) == pytest.approx(float(expected), abs=1e-6)
    assert kl_divergence(original, original) == 0


def test_a_large_vocabulary_costs_no_digits():
    logits = 3 * torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    original = logits + 0.1 * torch.randn(64, 50_000, generator=torch.Generator().manual_seed(1))
    log_q, log_p = (x.double().log_softmax(-1) for x in (logits, original))
    expected = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert (kl_divergence(logits, original) - expected).abs().max() < 1e-7


def test_the_error_is_over_texts_and_differences_are_paired():
    model = short()
    windows = [Window(w, text=i // 2) for i, w in enumerate(random_windows(8, 12))]
    reference, found = model.reference(windows), []
    for layers in ([1], [1, 2]):
        with model.without_layers(layers):
            found.append(window_perplexities(model.decoder, windows, reference=reference))
    one, two = map(combined, found)
    rows = [s._replace(nats=s.kld) for s in two.samples]
    assert two.kld.error == sampling_error(rows) and two.kld.error.texts == 4
    change = difference(*found, by="kld")
    assert change.nats == pytest.approx(two.kld.value - one.kld.value)
    content = two.to_dict()
    assert content["kld"] == two.kld.value
    assert content["kld_interval_95"] == [*two.kld.interval()]
    assert content["same_top_standard_error"] == two.same_top.error.standard_error
    wide = Mean(0.1, replace(two.kld.error, standard_error=1.0))
    assert wide.interval()[0] == 0.0  # no divergence is below 0
    alone = found[0][0]  # one window tells nothing of others
    assert all(math.isnan(end) for end in alone.kld.interval())
    assert "kld" in alone.to_dict() and "kld_interval_95" not in alone.to_dict()


def test_the_first_perplexity_reads_the_windows_that_a_reference_expects():
    model = short()
    windows = [w[:length] for w, length in zip(random_windows(4, 20), (20, 3, 11, 2), strict=True)]
    plain, expected = model.perplexity(windows, batch_size=2), model.reference(windows)
    entered = []
    model.decoder.layers[0].register_forward_hook(lambda *_: entered.append(1))
    reference = model.reference(windows, read=False)
    entered.clear()
    first = model.perplexity(windows, batch_size=2, reference=reference)
    assert len(entered) == 2 and first == plain
    assert (first.kld.value, first.same_top.value) == (0.0, 1.0)
    assert torch.allclose(reference.logits(windows, 20)[0], expected.logits(windows, 20)[0])
    with model.without_layers([1, 3]):
        far, near = (model.perplexity(windows, reference=r) for r in (reference, expected))
    assert far.kld.value == pytest.approx(near.kld.value, abs=1e-6) and far.kld.value > 1e-5


def test_a_head_alone_predicts_what_the_model_did():
    model = short()
    windows = random_windows(2, 10)
    reference = model.reference(windows)
    before = reference.logits(windows, 10)
    reference.keep_head()
    assert len(model.decoder.layers) == 1
    assert torch.equal(reference.logits(windows, 10), before)


def test_the_head_of_a_model_whose_layers_cannot_be_removed_stays_whole():
    model = make("llama")
    model.model.layers[3].mlp = model.model.layers[2].mlp  # shared weights
    decoder, windows = HFDecoder(model), random_windows(1, 8)
    reference = Reference(decoder)
    reference.read(windows)
    before = reference.logits(windows, 8)
    reference.keep_head()
    assert len(decoder.layers) > 1 and torch.equal(reference.logits(windows, 8), before)


@pytest.mark.parametrize("mixed", [False, True])
def test_logits_of_the_original_are_kept_within_the_room_and_lose_nothing(mixed):
    model, windows = short(), random_windows(2, 10)
    model.decoder.mixed = mixed
    reference = model.reference(windows)
    expected = [reference.logits([w], 10) for w in windows]
    one = expected[0].nbytes // (2 if mixed else 1)  # bfloat16 holds its products' digits
    reference.room = 2 * one - 1
    assert all(map(torch.equal, [reference.logits([w], 10) for w in windows], expected))
    assert reference.room == one - 1  # the second had no room
    model.decoder.keep_layers([0])
    model.decoder.model.output.weight.data.zero_()  # what is kept is not computed again
    again = [reference.logits([w], 10) for w in windows]
    assert torch.equal(again[0], expected[0]) and not again[1].any()
    model.decoder.mixed = not mixed  # other products are not those that were kept
    assert not reference.logits(windows[:1], 10).any()


@pytest.mark.parametrize("most, calls", [(2**31, 3), (1, 3 * 7)])
def test_a_search_needs_the_originals_head_once_a_window_where_memory_allows(
    most, calls, monkeypatch
):
    model, windows, seen = short(6), random_windows(3, 14), []
    reference = Reference(model.decoder)
    plain = reference._head.logits
    monkeypatch.setattr(reference._head, "logits", lambda *a: seen.append(1) or plain(*a))
    with monkeypatch.context() as patched:
        patched.setattr(search, "Reference", lambda _: reference)
        options = SearchOptions(max_memory=most)
        found = by_loss(model.decoder, windows, 2, options, method="greedy_kld")
    assert len(seen) == calls  # 4 trials, and 3
    assert found == by_loss(model.decoder, windows, 2, SearchOptions(), method="greedy_kld")


def test_a_greedy_search_by_divergence_takes_the_nearest_model_in_each_round():
    model, windows = short(6), random_windows(3, 14)
    reference, removed = model.reference(windows), []
    while len(removed) < 3:
        distance = {}
        for layer in {*range(1, 5)} - {*removed}:
            with without_layers(model.decoder, sorted([*removed, layer])):
                found = perplexity(model.decoder, [windows], reference=reference)
            distance[layer] = found.kld.value
        removed.append(min(distance, key=distance.__getitem__))
    result = by_loss(model.decoder, windows, 3, SearchOptions(), method="greedy_kld")
    assert result.removed == removed
    assert result.losses[-1] == pytest.approx(distance, abs=1e-6)

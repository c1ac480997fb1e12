"""Searches by loss: the plain loop's lists and losses, from stored states."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from conftest import interrupted, make_transformer, random_windows, refuses, zero_layer
from families import FAMILIES, make

from llama.model import TransformerBlock
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.models.decoder import Decoder, MetaDecoder, without_layers
from short_gpt.models.hf import HFDecoder
from short_gpt.models.layer_calls import PartialRun
from short_gpt.runtime.state import StateFile
from short_gpt.selection.search import SearchOptions, by_loss


def plain_sleb(decoder: Decoder, windows: list[list[int]], n: int):
    """SLEB as its authors' loop has it: every trial from the beginning."""
    count, removed, losses = len(decoder.layers), [], []
    for _ in range(n):
        alive = [i for i in range(count) if i not in removed]
        loss = {}
        for j in alive[1:-1]:
            with without_layers(decoder, [*removed, j]):
                found = perplexity(decoder, [[w] for w in windows])
            loss[j] = found.nats / found.tokens
        removed.append(min(loss, key=lambda i: (loss[i], i)))
        losses.append(loss)
    return removed, losses


def model(layers: int = 8):
    return MetaDecoder(make_transformer(n_layers=layers))


def sleb(decoder, windows, n, **options):
    return by_loss(decoder, windows, n, SearchOptions(**options), method="sleb")


def one_shot(decoder, windows, n, **options):
    return by_loss(decoder, windows, n, SearchOptions(**options), method="perplexity")


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 2}, {"max_memory": 1}, {"max_memory": 4 * 98 * 32 * 4}]
)
def test_sleb_equals_the_plain_loop(options):
    windows = [w[:n] for w, n in zip(random_windows(5, 24), (24, 24, 24, 9, 17), strict=True)]
    found = sleb(model(), windows, 4, **options)
    removed, losses = plain_sleb(model(), windows, 4)
    assert found.removed == removed
    for ours, theirs in zip(found.losses, losses, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5) and list(ours) == list(theirs)


@pytest.fixture
def ran(monkeypatch):
    """Windows read by every layer that runs, except the one token that looks at its output."""
    windows, plain_forward = [], TransformerBlock.forward

    def counted(self, x, *args, **kwargs):
        windows.append(len(x) if x.shape[1] > 1 else 0)
        return plain_forward(self, x, *args, **kwargs)

    monkeypatch.setattr(TransformerBlock, "forward", counted)
    return windows


def test_sleb_runs_about_half_of_the_layers(ran):
    sleb(model(8), random_windows(3, 12), 1)
    # 6 trials of 7 layers each; here 6 + 5 + ... + 1 behind the trials and 6 to move on
    assert sum(ran) == 3 * (21 + 6)


def test_what_a_round_leaves_unchanged_is_not_run_again(ran):
    found = sleb(model(8), random_windows(3, 12), 2)
    again = max(0, 6 - found.removed[0] - 1)  # behind the removed layer the states move on anew
    few, ran[:] = sum(ran), []
    assert few == 3 * (21 + 6 + 15 + again)
    bounded = sleb(model(8), random_windows(3, 12), 2, max_memory=1)
    assert sum(ran) > few
    assert (bounded.removed, bounded.losses) == (found.removed, found.losses)


def test_the_model_is_left_as_it_was():
    decoder = model()
    tokens = torch.tensor(random_windows(1, 12))
    before = decoder.logits(tokens)
    sleb(decoder, random_windows(2, 12), 2)
    assert torch.equal(decoder.logits(tokens), before)
    assert not any(
        "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
        for layer in decoder.layers
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_removed_layers_in_every_family(family):
    decoder = HFDecoder(make(family))
    count = len(decoder.layers)
    windows = [w[:12] for w in random_windows(2, 12, vocab=min(decoder.vocab_size, 96))]
    try:
        decoder.keep_layers(range(1, count))()
    except ValueError as error:  # a family whose layers this version cannot remove
        pytest.skip(str(error))
    loss = one_shot(decoder, windows, 1).losses[0]
    assert list(loss) == list(range(count))
    for j in (1, count - 2):
        with without_layers(decoder, [j]):
            found = perplexity(decoder, [[w] for w in windows])
        assert loss[j] == pytest.approx(found.nats / found.tokens, abs=1e-5)


def test_ties_go_to_the_lower_layer_and_the_ends_stay():
    decoder = model(5)
    for i in range(5):
        zero_layer(decoder.model, i)
    windows = random_windows(2, 10)
    assert sleb(decoder, windows, 3).removed == [1, 2, 3]
    assert one_shot(decoder, windows, 4).removed == [0, 1, 2, 3]


def test_a_search_for_fewer_layers_takes_the_first_of_a_saved_one(tmp_path):
    windows = random_windows(4, 16)
    whole = sleb(model(), windows, 3, state=StateFile(tmp_path / "s", {}))
    fewer = sleb(model(), windows, 2, state=StateFile(tmp_path / "s", {}))
    assert fewer.removed == whole.removed[:2] and fewer.losses == whole.losses[:2]
    assert sleb(model(), windows, 3, start=fewer) == whole  # or goes on with them
    with interrupted(PartialRun, "logits", 20):
        sleb(model(), windows, 3, state=StateFile(tmp_path / "begun", {}))
    # whose first round is not the third
    begun = StateFile(tmp_path / "begun", {})
    assert sleb(model(), windows, 3, state=begun, start=fewer) == whole


def test_a_state_of_another_search_is_refused(tmp_path):
    windows, path = random_windows(4, 16), tmp_path / "s"
    sleb(model(), windows, 2, state=StateFile(path, {}))
    calls = {
        "windows": lambda state: sleb(model(), random_windows(3, 16), 2, state=state),
        "method": lambda state: one_shot(model(), windows, 2, state=state),
        "candidates, layers": lambda state: sleb(model(7), windows, 2, state=state),
    }
    for name, call in calls.items():
        expected = rf"s is the state of another search \(it differs in {name}\); go on with"
        refuses(expected, call, StateFile(path, {}))
    one_shot(model(), windows, 2, state=StateFile(tmp_path / "one", {}))  # names no candidates
    with pytest.raises(ValueError, match=r"another search \(it differs in method, candidates\)"):
        sleb(model(), windows, 2, state=StateFile(tmp_path / "one", {}))
    StateFile(path, {}).save({"importance": {}})
    refuses("state of another search", sleb, model(), windows, 2, state=StateFile(path, {}))


def test_a_round_is_continued_with_more_or_less_memory(tmp_path):
    windows, much, little = random_windows(4, 16), 2**31, 2 * 16 * 32 * 4  # two windows of width 32
    whole = sleb(model(), windows, 3)
    for first, then in ((much, little), (little, much)):
        path = tmp_path / f"{first}"
        with interrupted(PartialRun, "logits", 9):
            sleb(model(), windows, 3, max_memory=first, state=StateFile(path, {}))
        saved = StateFile(path, {})
        assert saved.content["search"]["tried"]
        assert sleb(model(), windows, 3, max_memory=then, state=saved) == whole


@pytest.mark.parametrize(
    ("stop_at", "max_memory"), [(12, 1), (3, 12000), (12, 12000), (40, 12000), (12, 2**31)]
)
def test_an_interrupted_search_ends_as_one_that_is_not(tmp_path, ran, max_memory, stop_at):
    windows, decoder = random_windows(4, 16), model()
    whole = sleb(decoder, windows, 3, max_memory=max_memory)
    assert whole.losses[0] == sleb(model(), windows, 1, max_memory=1).losses[0]
    with interrupted(PartialRun, "logits", stop_at):
        sleb(decoder, windows, 3, max_memory=max_memory, state=StateFile(tmp_path / "s", {}))
    state = StateFile(tmp_path / "s", {})
    ran.clear()
    assert sleb(decoder, windows, 3, max_memory=max_memory, state=state) == whole
    again, ran[:] = sum(ran), []
    sleb(decoder, windows, 3, max_memory=max_memory)
    assert again < sum(ran) or stop_at < 4  # what was tried before is not run again


def test_a_loss_that_is_not_finite_is_an_error():
    decoder = model(5)
    with torch.no_grad():
        decoder.model.layers[0].feed_forward.w2.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss without layer 1 is NaN"):
        sleb(decoder, random_windows(2, 10), 1)


@pytest.mark.parametrize(
    ("search", "layers", "n", "message"),
    [
        (sleb, 5, 4, "n = 4; the model has 5 layers: expected 1 to 3"),
        (one_shot, 5, 5, "n = 5; the model has 5 layers: expected 1 to 4"),
        (sleb, 2, 1, "n = 1; the model has 2 layers"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, layers, n, message):
    refuses(message, search, model(layers), random_windows(2, 10), n)


def test_windows_without_a_prediction():
    refuses("nothing was predicted", sleb, model(5), [[1], [2]], 1)


def test_one_shot_takes_the_layers_whose_absence_alone_costs_least():
    decoder, windows, loss = model(), random_windows(3, 20), []
    for i in range(8):
        with without_layers(decoder, [i]):
            loss.append(perplexity(decoder, [windows]).nats)
    found = one_shot(decoder, windows, 3).removed
    assert found == sorted(range(8), key=loss.__getitem__)[:3]


def test_the_states_held_fit_into_the_memory_given(monkeypatch):
    size, made, held = 3 * 13 * 32 * 4, {}, []  # windows x tokens x width x float32
    advance, logits = PartialRun.advance, PartialRun.logits

    def noted(*args):
        state = advance(*args)
        made[id(state)] = weakref.ref(state)
        return state

    def watched(*args):
        held.append(sum(ref() is not None for ref in made.values()) * size // 3)
        return logits(*args)

    monkeypatch.setattr(PartialRun, "advance", noted)
    monkeypatch.setattr(PartialRun, "logits", watched)
    for room in (2, 4):
        made.clear(), held.clear()
        sleb(model(8), random_windows(3, 13), 2, max_memory=room * size)
        assert (room - 1) * size <= max(held) <= room * size

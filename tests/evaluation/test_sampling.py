"""Errors of means over tokens, against statsmodels, and by simulation where windows are alike."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.stats
from conftest import make_transformer, random_windows

from short_gpt.cli.tables import perplexities
from short_gpt.data.windows import Window, batches, text_number, windows
from short_gpt.evaluation.perplexity import (
    Perplexity,
    Sample,
    combined,
    difference,
    perplexity,
    sampling_error,
    window_perplexities,
)
from short_gpt.healing.choosing import ResultCache
from short_gpt.models.decoder import MetaDecoder
from short_gpt.runtime.state import StateFile

WINDOWS = [(0, 30.5, 10), (0, 41.25, 15), (1, 12.0, 6), (2, 70.0, 20), (2, 33.5, 11)]
WINDOWS += [(2, 9.75, 4), (3, 55.0, 20), (3, 52.0, 19)]
SAMPLES = [Sample(*row) for row in WINDOWS]


def jackknife(units: dict[int, list[Sample]]) -> float:
    """The error by leaving out one unit after the other."""
    means, every = [], [s for own in units.values() for s in own]
    for left_out in units:
        rest = [s for unit, own in units.items() if unit != left_out for s in own]
        means.append(sum(s.nats for s in rest) / sum(s.tokens for s in rest))
    whole, count = sum(s.nats for s in every) / sum(s.tokens for s in every), len(units)
    return math.sqrt((count - 1) / count * sum((m - whole) ** 2 for m in means))


def test_the_error_over_texts_is_the_jackknifes():
    found = sampling_error(SAMPLES)
    units = {text: [s for s in SAMPLES if s.text == text] for text in range(4)}
    assert (found.windows, found.texts) == (8, 4)
    assert found.standard_error == pytest.approx(jackknife(units), rel=1e-12)
    # texts of 25, 6, 35 and 39 tokens of 105, as odds
    odds = [size / (105 - size) for size in (25, 6, 35, 39)]
    squares = [o * o for o in odds]
    spread = sum(squares) ** 2 - sum(s * s for s in squares) + sum(squares)
    assert found.degrees == pytest.approx(sum(odds) ** 2 / spread, rel=1e-12)
    assert 1.5 < found.degrees < 3
    quantile = scipy.stats.t.ppf(0.975, found.degrees)
    assert found.margin() == pytest.approx(quantile * found.standard_error, rel=1e-12)
    quantile = scipy.stats.t.ppf(0.95, found.degrees)
    assert found.margin(0.9) == pytest.approx(quantile * found.standard_error, rel=1e-12)


@pytest.mark.parametrize("text", [5, None])
def test_the_error_over_windows_of_one_text_is_the_jackknifes(text):
    found = sampling_error([s._replace(text=text) for s in SAMPLES])
    assert 3 < found.degrees < 7
    expected = jackknife({i: [sample] for i, sample in enumerate(SAMPLES)})
    assert found.standard_error == pytest.approx(expected, rel=1e-12)
    assert ("1 text: what other texts would" if text else "texts are not known") in found.over


# statsmodels 0.15.0, four texts of 20 tokens: with y = nats / tokens and g the texts,
# WLS(y, ones, weights=tokens).fit(cov_type="cluster", cov_kwds={"groups": g}, use_t=True);
# bse and half of conf_int
EQUAL = [Sample(*row) for row in [(0, 30.5, 8), (0, 41.25, 12), (1, 50.0, 20), (2, 70.0, 20)]]
EQUAL += [Sample(3, 9.75, 4), Sample(3, 55.0, 16)]
CLUSTERED = (0.2468815927389752, (3.99193741 - 2.42056259) / 2)


def test_the_error_over_texts_of_one_size_is_that_of_statsmodels():
    found = sampling_error(EQUAL)
    assert found.degrees == pytest.approx(3)
    assert found.standard_error == pytest.approx(CLUSTERED[0], rel=1e-12)
    assert found.margin() == pytest.approx(CLUSTERED[1], rel=1e-7)


@pytest.mark.parametrize(
    ("sizes", "texts", "said"),
    [
        ([9], [0], "one window tells nothing of others"),
        ([9, 5], [0, 0], "two windows are too few to estimate an interval"),
        ([9, 5, 5], [0, 1, 1], "two texts are too few to estimate an interval"),
        ([99, 5, 5], [0, 1, 2], "the 3 texts share their tokens too unequally"),
        ([99, 3, 3, 3], None, "the 4 windows share their tokens too unequally"),
    ],
)
def test_where_no_interval_is_honest_it_says_so(sizes, texts, said):
    rows = zip(texts or [None] * len(sizes), sizes, strict=True)
    found = [Sample(text, 2.0 * size + i, size) for i, (text, size) in enumerate(rows)]
    error = sampling_error(found)
    assert not error.has_margin and math.isnan(error.margin())
    assert error.no_interval.startswith(said)
    measured = Perplexity.of(found)
    assert f"no interval: {said}" in perplexities({"a": measured})
    assert "interval_95" not in measured.to_dict()
    assert f"no interval: {said}" in str(difference([measured], [measured]))
    unequal = [Sample(i, 2.0 * size + i, size) for i, size in enumerate([85, 8, 7])]
    assert sampling_error(unequal).has_margin and sampling_error(unequal).margin() > 0


def test_intervals_hold_where_texts_differ_in_length():
    """3 texts of 20, 2 and 2 windows, whose tokens share all that sets texts apart."""
    generator, covered, below = np.random.default_rng(0), 0, 0
    for values in generator.normal(0, 1, (2000, 3)):
        rows = [Sample(i, 100 * n * values[i], 100 * n) for i, n in enumerate((20, 2, 2))]
        error, mean = sampling_error(rows), (20 * values[0] + 2 * sum(values[1:])) / 24
        covered += abs(mean) < error.margin()
        below += mean < error.margin(0.9)
    assert covered / 2000 > 0.93 and below / 2000 > 0.93


def encode(text: str) -> list[int]:
    return [ord(c) % 90 for c in text]


@pytest.mark.parametrize("seed", [None, 0])
def test_windows_know_their_text(seed):
    texts = ["first text, of some length", "short", "the third, with a beginning of its own"]
    found = list(windows(texts, encode, size=8, stride=8, seed=seed))
    assert {w.text for w in found} == {0, 2}
    starts = {number: [] for number in (0, 2)}
    for w in found:
        p = w.origin.position
        assert encode(texts[w.text])[p : p + len(w)] == w
        starts[w.text].append(p)
    assert {number: sorted(own) for number, own in starts.items()} == {
        0: [0, 8, 16],
        2: [0, 8, 16, 24],
    }
    (kept,) = batches(found, 100)
    assert [text_number(w) for w in kept] == [w.text for w in found]
    for again in (pickle.loads(pickle.dumps(found[0])), copy.deepcopy(found[0])):
        assert again == found[0] and again.text == found[0].text
    assert text_number([1, 2]) is None


def test_perplexity_and_its_changes_count_texts():
    decoder = MetaDecoder(make_transformer())
    cut = [
        Window(w, text) for w, text in zip(random_windows(6, 20), [0, 0, 1, 1, 2, 2], strict=True)
    ]
    parts = window_perplexities(decoder, cut, progress=False)
    whole = perplexity(decoder, [cut[:4], cut[4:]])
    assert whole.error.texts == combined(parts).error.texts == 3
    assert whole.error.margin() == pytest.approx(combined(parts).error.margin(), rel=1e-4)
    low, high = whole.interval()
    assert math.log(high / low) == pytest.approx(2 * whole.error.margin())
    assert "6 windows of 3 texts, the texts being the samples" in perplexities({"a": whole})
    assert f"95%: {low:.3f} to {high:.3f}" in perplexities({"a": whole})
    found = whole.to_dict()
    assert found["texts"] == 3 and found["interval_95"] == [low, high]
    halved = [p.__class__(p.nats / 2, p.tokens, 1, tuple(s._replace(nats=s.nats / 2)
              for s in p.samples)) for p in parts]  # fmt: skip
    change = difference(parts, halved)
    assert change.texts == 3 and change.error.degrees == pytest.approx(2)
    assert change.standard_error == pytest.approx(whole.error.standard_error / 2, rel=1e-4)
    assert "paired over 6 windows of 3 texts" in str(change)
    one = perplexity(decoder, [[Window(w, 0) for w in cut[:3]]])
    assert "3 windows of 1 text: what other texts would give is not covered" in perplexities(
        {"a": one}
    )
    assert perplexity(decoder, [[Window(cut[0], 0)]]).error.over.startswith("1 window of 1 text")


def test_the_texts_of_a_difference_are_known_where_both_sides_name_the_same():
    named = [Perplexity.of([sample]) for sample in SAMPLES]
    for text in (None, 9):  # not known on one side, or others there
        others = [Perplexity.of([s._replace(text=text, nats=s.nats + i)]) for i, s in
                  enumerate(SAMPLES)]  # fmt: skip
        for pair in ((named, others), (others, named)):
            change = difference(*pair)
            assert change.texts is None and change.windows == 8
            assert change.degrees > 3  # of eight windows, not of four texts
    assert difference(named, named).texts == 4


def test_windows_of_parts_that_hold_several_add_up():
    parts = [Perplexity.of(SAMPLES[:3]), Perplexity.of(SAMPLES[3:])]
    whole = combined(parts)
    assert whole.windows == 8 and whole == Perplexity.of(SAMPLES)
    without_samples = [Perplexity(p.nats, p.tokens, p.windows) for p in parts]
    assert combined(without_samples).windows == 8


def test_what_a_kill_left_of_a_measurement_goes_with_its_value(tmp_path, monkeypatch):
    def search(part):
        part.save({"found": 3})
        return 3

    with monkeypatch.context() as killed:
        killed.setattr(StateFile, "clear", lambda self: None)  # as if it was killed before
        ResultCache(StateFile(tmp_path / "s", {"a": 1})).resumed("a search", search)
    assert (tmp_path / "s.a-search").exists()
    assert ResultCache(StateFile(tmp_path / "s", {"a": 1})).resumed("a search", search) == 3
    assert not (tmp_path / "s.a-search").exists()


def test_cells_keep_what_windows_gave(tmp_path):
    state = StateFile(tmp_path / "c.json", {"a": 1})
    parts = [Perplexity.of([Sample(i, n, t, n / 2, t - 1)]) for i, n, t in WINDOWS]
    ResultCache(state).perplexities("new", lambda: parts)
    again = ResultCache(StateFile(tmp_path / "c.json", {"a": 1})).perplexities("new", list)
    assert again == parts and [p.samples for p in again] == [p.samples for p in parts]

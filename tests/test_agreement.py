"""Calibration: choices, agreement, and the cross table, each as worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from conftest import CharTokenizer, make_transformer, random_windows

from benchmarks.lib.agreement import (
    SplitWindows,
    WindowScores,
    agreement,
    calibrate,
    correlations,
    mixed,
    score_windows,
    stretched_interval,
)
from short_gpt import ShortLlama, heal_refit
from short_gpt.data.windows import Window
from short_gpt.evaluation.perplexity import combined, difference, window_perplexities
from short_gpt.healing import choosing
from short_gpt.selection.methods import choose

TEXTS = {
    "even": SplitWindows(random_windows(4, 24), random_windows(3, 24, seed=5)),
    "low": SplitWindows(
        random_windows(4, 24, vocab=9, seed=2), random_windows(3, 24, vocab=9, seed=7)
    ),
    "high": SplitWindows(
        [[95 - i for i in w] for w in random_windows(4, 24, vocab=7, seed=3)],
        [[95 - i for i in w] for w in random_windows(3, 24, vocab=7, seed=8)],
    ),
}


class Tiny:
    def __init__(self) -> None:
        self.model, self.tokenizer = make_transformer(n_layers=6), CharTokenizer()


def short() -> ShortLlama:
    return ShortLlama(Tiny())


@pytest.fixture(scope="module")
def found():
    return calibrate(short(), TEXTS, 2, progress=False)


@pytest.mark.parametrize("method", ["bi", "relative_magnitude", "angular"])
def test_each_text_chooses_what_its_scores_choose(method):
    model = short()
    for parts in TEXTS.values():
        model.importance = type(model.importance).empty(model.kept)
        model.measure(parts.ranking, progress=False)
        own = score_windows(model, parts.ranking, 2, method=method, progress=False)
        assert own.chosen == sorted(choose(model.importance, 2, method=method))


def test_all_texts_together_choose_with_the_same_weight():
    scores = {
        name: WindowScores([4, 7, 9], "bi", 1, sums, weights, [None] * len(weights))
        for name, sums, weights in (
            ("short", [[1.0, 2.0, 30.0]], [1.0]),
            ("long", [[900.0, 100.0, 300.0], [900.0, 100.0, 300.0]], [100.0, 100.0]),
        )
    }
    # means 1, 2, 30 and 9, 1, 3: together 10, 3, 33, where tokens as weights would give 9, 1, 3.3
    assert mixed(scores) == [7]


def test_a_block_is_chosen_by_its_start():
    scores = WindowScores([0, 1, 2, 3, 4], "angular", 3, [[0.3, 0.1, 0.2]], [1.0], [None])
    assert scores.chosen == [1, 2, 3]


@pytest.mark.parametrize("healing", ["raw", "refit"])
def test_a_cell_is_the_model_without_the_choice_of_one_text_judged_on_another(found, healing):
    cells = {(c.choice, c.text): c for c in found.cells if c.healing == healing}
    assert len(cells) == 4 * 3
    cell = cells["low", "high"]
    assert cell.layers == found.choices["low"]
    judged = TEXTS["high"].judged

    def cut(choice):
        model = short()
        if healing == "refit":
            heal_refit(model, found.choices[choice], TEXTS[choice].ranking, progress=False)
        else:
            model.remove_layers(found.choices[choice])
        return window_perplexities(model.decoder, judged, progress=False)

    whole, theirs, own = (
        window_perplexities(short().decoder, judged, progress=False),
        cut("low"),
        cut("high"),
    )
    assert cell.perplexity == pytest.approx(combined(theirs).value, rel=1e-5)
    for name, change in (("nats", difference(whole, theirs)), ("excess", difference(own, theirs))):
        assert getattr(cell, name) == pytest.approx(change.nats, abs=1e-5)
    excess = difference(own, theirs)
    assert cell.excess_error == pytest.approx(excess.standard_error, abs=1e-5)
    upper = excess.nats + scipy.stats.t.ppf(0.95, 2) * excess.standard_error
    assert cell.excess_most == pytest.approx(upper, abs=1e-5)
    assert cells["high", "high"].excess == cells["high", "high"].excess_most == 0


def test_the_mix_is_refitted_on_windows_of_all_texts_in_turn(monkeypatch):
    seen, plain = [], choosing.refit.fit

    def watched(model, layers, windows, **options):
        seen.append([*windows])
        return plain(model, layers, windows, **options)

    monkeypatch.setattr(choosing.refit, "fit", watched)
    texts = {**TEXTS, "low": TEXTS["low"]._replace(ranking=TEXTS["low"].ranking[:2])}
    calibrate(short(), texts, 2, healings=["refit"], progress=False)
    even, low, high = (parts.ranking for parts in texts.values())
    # as many as the text with the most has
    assert (len(even), len(low)) == (4, 2) and seen == [
        even,
        low,
        high,
        [even[0], low[0], high[0], even[1]],
    ]


def test_rankings_agree_as_far_as_their_means_do(found):
    assert [(a.first, a.second) for a in found.agreement] == [
        *((name, name) for name in TEXTS),
        ("even", "low"),
        ("even", "high"),
        ("low", "high"),
    ]
    model = short()
    first, second = (
        score_windows(model, TEXTS[name].ranking, 2, progress=False) for name in ("even", "low")
    )
    expected = scipy.stats.spearmanr(first.means, second.means).statistic
    between = found.agreement[3]
    assert between.correlation == pytest.approx(expected)
    assert between.shared == len({*found.choices["even"]} & {*found.choices["low"]})
    low, high = between.interval
    assert -1 <= low <= between.correlation <= high <= 1
    halves = agreement(("even", "even"), first.half(0), first.half(1))
    assert halves == found.agreement[0]
    assert first.half(1).sums == first.sums[1::2]


def drawn_scores(windows: int, seed: int = 0) -> WindowScores:
    """Noisy scores of 12 layers."""
    draw = np.random.default_rng(seed)
    means = np.linspace(1, 2, 12) * np.exp(0.3 * draw.normal(size=(windows, 12)))
    sums, ones = means.tolist(), [1.0] * windows
    return WindowScores([*range(12)], "bi", 4, sums, ones, [None] * windows)


def test_the_windows_of_two_rankings_are_drawn_independently():
    """Drawn alike, a ranking would agree with itself in every resample."""
    scores = drawn_scores(8)
    found = agreement(("a", "a"), scores, scores)
    assert found.correlation == pytest.approx(1) and found.shared == 4
    assert found.interval[0] < 0.9 and found.shared_interval[0] < 4
    drawn = scores.resampled(0), scores.resampled(1)
    assert found.interval == stretched_interval(
        found.correlation, correlations(*drawn), scores.degrees
    )


@pytest.mark.parametrize("few_first", [True, False])
def test_the_degrees_are_those_of_the_ranking_with_fewer_windows(few_first):
    pair = (drawn_scores(4), drawn_scores(16, seed=1))[:: 1 if few_first else -1]
    assert sorted(scores.degrees for scores in pair) == pytest.approx([3, 15])
    found = agreement(("a", "b"), *pair)
    drawn = correlations(pair[0].resampled(0), pair[1].resampled(1))
    assert found.interval == pytest.approx(stretched_interval(found.correlation, drawn, 3))


def test_documents_of_different_lengths_have_fewer_degrees():
    def degrees(texts, weights):
        sums = [[1.0, 2.0]] * len(texts)
        return WindowScores([0, 1], "bi", 1, sums, weights, texts).degrees

    assert degrees([0, 0, 1, 2], [2.0, 2.0, 4.0, 4.0]) == pytest.approx(2)
    assert degrees([0, 0, 1, 2], [10.0, 10.0, 2.0, 2.0]) == pytest.approx(1.0390095)
    assert degrees([None] * 4, [5.0] * 4) == pytest.approx(3)


def test_a_distance_of_a_window_counts_once_however_many_tokens_it_has():
    model, cut = short(), [w[:n] for w, n in zip(random_windows(3, 24), (24, 5, 12), strict=True)]
    model.measure(cut, progress=False)
    own = score_windows(model, cut, 2, method="angular", progress=False)
    assert own.weights == [1, 1, 1]
    assert own.means == pytest.approx(model.importance.angular.diagonal(2).numpy(), rel=1e-5)
    by_tokens = score_windows(model, cut, 2, progress=False)
    assert by_tokens.weights == [24, 5, 12]
    assert by_tokens.means == pytest.approx(model.importance.block_influence.numpy(), rel=1e-5)


def test_correlations_are_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 12))
    expected = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert correlations(a, b) == pytest.approx(np.array(expected))


def test_documents_are_drawn_whole_where_there_are_several():
    sums = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    of_texts = WindowScores([0, 1], "bi", 1, sums, [1.0] * 4, [0, 0, 1, 1])
    assert {tuple(row) for row in of_texts.resampled(0).tolist()} == {(1, 0), (0.5, 0.5), (0, 1)}
    alone = WindowScores([0, 1], "bi", 1, sums, [1.0] * 4, [0, 0, 0, 0])
    assert len({tuple(row) for row in alone.resampled(0).tolist()}) == 5


def covered(windows: int, noise: float, draw: np.random.Generator) -> bool:
    """Whether the interval of one simulated pair of texts holds the correlation of their means."""
    first = np.exp(draw.normal(-3, 0.6, 24))
    second = first * np.exp(draw.normal(0, 0.3, 24))
    truth = correlations(first[None], second[None])[0]
    scores = [
        WindowScores(
            [*range(24)],
            "bi",
            4,
            (own * np.exp(noise * draw.normal(size=(windows, 24)))).tolist(),
            [1.0] * windows,
            [None] * windows,
        )
        for own in (first, second)
    ]
    low, high = agreement(("a", "b"), *scores).interval
    return low <= truth <= high


def test_the_interval_of_a_correlation_holds_it_as_often_as_it_says():
    draw = np.random.default_rng(0)
    assert np.mean([covered(12, 0.4, draw) for _ in range(60)]) >= 0.95


def test_an_interval_is_not_below_what_noise_takes_away():
    drawn = np.array([0.8, 0.82, 0.84, 0.83])  # all below what was measured
    low, high = stretched_interval(0.88, drawn, 11)
    stretch = scipy.stats.t.ppf(0.975, 11) / scipy.stats.norm.ppf(0.975) * (12 / 11) ** 0.5
    assert low == pytest.approx(0.88 - stretch * (0.88 - np.quantile(drawn, 0.025)), rel=1e-4)
    assert high == pytest.approx(0.88 + (0.88 - low))
    assert stretched_interval(1.0, np.array([1.0, 1.0]), 5) == (1, 1)
    assert stretched_interval(0.5, np.array([0.5]), 0) == (-1, 1)


def test_other_ways_of_cutting_are_compared_with_the_first():
    ways = {"12 tokens": {name: [w[:12] for w in p.ranking] for name, p in TEXTS.items()}}
    done = calibrate(short(), TEXTS, 2, healings=["raw"], ways=ways, progress=False)
    found = done.ways["12 tokens"]
    assert [(a.first, a.second) for a in found] == [(name, name) for name in TEXTS]
    model, parts = short(), TEXTS["high"]
    both = [
        score_windows(model, windows, 2, progress=False).means
        for windows in (parts.ranking, [w[:12] for w in parts.ranking])
    ]
    assert found[2].correlation == pytest.approx(scipy.stats.spearmanr(*both).statistic)
    assert json.dumps(done.to_dict(), allow_nan=False)


def test_windows_of_documents_are_known_by_their_text():
    windows = [Window([3, 4, 5], 2), Window([6, 7, 8], 5)]
    assert score_windows(short(), windows, 2, progress=False).texts == [2, 5]

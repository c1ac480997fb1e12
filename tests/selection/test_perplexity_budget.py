"""As many layers as a perplexity allows, on known perplexities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.sampling import Sample
from short_gpt.selection.perplexity_budget import most_layers

ORDER = [3, 0, 2, 1, 4]


def tried_with(values: list[float], *, ratio: float, most: int = 5):
    """The budget where removing n layers gives values[n], and the sets that were tried."""
    seen = []

    def perplexity_without(layers):
        seen.append(layers)
        nats = 7 * math.log(values[len(layers)])
        return Perplexity.of([Sample(0, nats, 7)] * 3)

    return most_layers(perplexity_without, lambda n: ORDER[:n], ratio=ratio, most=most), seen


@pytest.mark.parametrize(
    ("ratio", "layers"), [(1.0, []), (1.05, []), (1.2, [3]), (1.35, [3, 0]), (2.0, [3, 0, 2])]
)
def test_layers_go_while_the_ratio_holds(ratio, layers):
    budget, seen = tried_with([10, 11, 13, 20, 40, 80], ratio=ratio)
    assert budget.layers == layers
    assert seen == [ORDER[:n] for n in range(len(layers) + 2)]  # one more, which is too many
    assert list(budget.tried) == list(range(len(layers) + 2))
    row = budget.to_dict()["tried"][1]
    assert (row["layers"], row["tokens"]) == (1, 21)
    assert row["ratio"] == pytest.approx(1.1) and row["perplexity"] == pytest.approx(11)
    assert budget.to_dict()["max_perplexity_ratio"] == ratio


def test_a_better_removal_behind_one_that_is_too_bad_is_not_reached():
    assert tried_with([10, 11, 30, 10, 10, 10], ratio=1.5)[0].layers == [3]


def test_no_more_than_the_most_are_tried():
    budget, seen = tried_with([10.0] * 6, ratio=1.0, most=2)
    assert budget.layers == ORDER[:2] and len(seen) == 3


def test_no_number_holds_no_ratio():
    assert tried_with([10, math.nan], ratio=1.5, most=1)[0].layers == []


def test_a_rise_that_no_float_holds_is_infinite():
    def without(layers):  # of one token each, so that no ratio of the values can be formed
        nats = (1.0, 1.0, 1.0) if not layers else (700.0, 710.0, 720.0)
        return Perplexity.of(Sample(text, value, 1) for text, value in enumerate(nats))

    budget = most_layers(without, lambda n: ORDER[:n], ratio=2.0, most=1)
    assert budget.layers == [] and budget.bounds(1)[1] == math.inf
    assert math.log(budget.bounds(1)[0]) == pytest.approx(709 - 16.8586, abs=1e-3)


def test_a_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match="max_perplexity_ratio = 0.5: expected a factor of at"):
        tried_with([10, 11], ratio=0.5)


def gate(changes: list[float], *, texts: list[int], ratio: float, confidence: float = 0.95):
    """The budget where removing the one layer changes the windows' losses so."""

    def perplexity_without(layers):
        return Perplexity.of(
            Sample(text, 100 * (3 + change * len(layers)), 100)
            for text, change in zip(texts, changes, strict=True)
        )

    return most_layers(
        perplexity_without, lambda n: [7], ratio=ratio, most=1, confidence=confidence
    )


def test_the_ratio_holds_with_its_error():
    noisy, texts = [0.0, 0.0, 0.3, 0.3], [0, 1, 2, 3]  # a mean of 0.15 ± 0.2038 (t, 3 degrees)
    low, high = (math.exp(0.15 + way * 2.3533634 * math.sqrt(0.03 / 4)) for way in (-1, 1))
    unsure = gate(noisy, texts=texts, ratio=1.3)
    assert unsure.tried[1].value / unsure.tried[0].value < 1.3
    assert unsure.bounds(1) == pytest.approx((low, high)) and unsure.layers == []
    assert "up to 1.4245, unknown whether within 1.3, 95% sure" in unsure.verdict(1)
    assert unsure.to_dict()["tried"][1]["at_most"] == pytest.approx(high)
    assert gate(noisy, texts=texts, ratio=1.43).layers == [7]
    assert gate(noisy, texts=texts, ratio=1.3, confidence=0.6).layers == [7]
    assert "above 1" in gate([0.3, 0.31, 0.3], texts=[0, 0, 0], ratio=1).verdict(1)
    # the same windows of two texts: what was sampled is two, which tell too little
    assert gate(noisy, texts=[0, 0, 1, 1], ratio=99).layers == []


def test_a_single_window_tells_nothing():
    budget = gate([0.0], texts=[0], ratio=2)
    assert budget.layers == [] and budget.to_dict()["tried"][1]["at_most"] is None
    said = "one window tells nothing of others; evaluate on more text"
    assert budget.verdict(1) == f"unknown whether within 2: {said}"


def test_a_ratio_that_does_not_hold_passes_as_seldom_as_is_said():
    """The true rise is just the ratio; windows of a text are alike."""
    generator, passed, texts = np.random.default_rng(1), 0, [i // 6 for i in range(60)]
    for _ in range(1000):
        changes = 0.1 + generator.normal(0, 0.05, 10).repeat(6) + generator.normal(0, 0.02, 60)
        passed += gate(changes.tolist(), texts=texts, ratio=math.exp(0.1)).layers == [7]
    assert 0.03 < passed / 1000 < 0.07


def test_one_long_text_among_short_ones_passes_it_no_more_often():
    """The true rise is just the ratio; texts of 20, 2, 2, 2 and 2 windows that are alike."""
    generator, passed = np.random.default_rng(2), 0
    texts = np.repeat(range(5), (20, 2, 2, 2, 2))
    for effects in generator.normal(0, 0.05, (300, 5)):
        changes = 0.1 + effects[texts] + generator.normal(0, 0.01, 28)
        passed += gate(changes.tolist(), texts=texts.tolist(), ratio=math.exp(0.1)).layers == [7]
    assert passed / 300 < 0.07


@pytest.mark.parametrize("confidence", [0.4, 1.0, math.nan])
def test_a_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match=f"confidence = {confidence}: expected at least 0.5"):
        gate([0.0], texts=[0], ratio=2, confidence=confidence)

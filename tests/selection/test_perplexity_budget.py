"""As many layers as a perplexity allows, on known perplexities."""

from __future__ import annotations

import math

import pytest

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.selection.perplexity_budget import most_layers

ORDER = [3, 0, 2, 1, 4]


def tried_with(values: list[float], *, ratio: float, most: int = 5):
    """The budget where removing n layers gives values[n], and the sets that were tried."""
    seen = []

    def perplexity_without(layers):
        seen.append(layers)
        return Perplexity(nats=7 * math.log(values[len(layers)]), tokens=7, windows=1)

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
    assert (row["layers"], row["tokens"]) == (1, 7)
    assert row["ratio"] == pytest.approx(1.1) and row["perplexity"] == pytest.approx(11)
    assert budget.to_dict()["max_perplexity_ratio"] == ratio


def test_a_better_removal_behind_one_that_is_too_bad_is_not_reached():
    assert tried_with([10, 11, 30, 10, 10, 10], ratio=1.5)[0].layers == [3]


def test_no_more_than_the_most_are_tried():
    budget, seen = tried_with([10.0] * 6, ratio=1.0, most=2)
    assert budget.layers == ORDER[:2] and len(seen) == 3


def test_no_number_holds_no_ratio():
    assert tried_with([10, math.nan], ratio=1.5, most=1)[0].layers == []


def test_a_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match="max_perplexity_ratio = 0.5: expected a factor of at"):
        tried_with([10, 11], ratio=0.5)

"""Paired errors of the differences between layers."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance, difference_margins
from short_gpt.scoring.moments import degrees_of_freedom

TOKENS = torch.tensor([10.0, 14.0, 6.0, 10.0, 12.0, 8.0])
BASE = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3, 0.6])  # what moves all layers of a window
MEANS = torch.stack([BASE, BASE + torch.tensor([1, 3, 2, 2, 1, 3]) / 100, 1.5 * BASE], dim=1)


def importance(texts: list[int] | None) -> Importance:
    """Six windows of three layers."""
    found, count = Importance.empty(range(3)), len(TOKENS)
    found.add(
        Scores(tokens=TOKENS, influence=MEANS * TOKENS[:, None], angles=torch.zeros(count, 4, 4)),
        texts,
    )
    return found


def by_hand(units: list[list[int]], i: int, j: int) -> float:
    """Half an interval of the mean of d = x_j - x_i over all tokens, of clusters of windows."""
    tokens = torch.stack([TOKENS[u].sum() for u in units]).double()
    sums = torch.stack([(TOKENS * (MEANS[:, j] - MEANS[:, i]))[u].sum() for u in units]).double()
    count, every = len(units), range(len(units))
    if count == 6:  # of windows only moments are known
        effective = tokens.sum() ** 2 / tokens.square().sum()
        residual = sums - sums.sum() / tokens.sum() * tokens
        error = residual.square().sum() / tokens.sum() ** 2 * effective / (effective - 1)
        return float(error.sqrt() * scipy.stats.t.ppf(0.975, float(effective - 1)))
    rests = [[g for g in every if g != out] for out in every]
    means = torch.stack([sums[rest].sum() / tokens[rest].sum() for rest in rests])
    error = ((means - sums.sum() / tokens.sum()).square().sum() * (count - 1) / count).sqrt()
    return float(error * scipy.stats.t.ppf(0.975, degrees_of_freedom(tokens)))


@pytest.mark.parametrize(
    ("texts", "units"),
    [
        ([0, 0, 1, 1, 2, 2], [[0, 1], [2, 3], [4, 5]]),
        ([4, 4, 4, 4, 4, 4], [[i] for i in range(6)]),
        (None, [[i] for i in range(6)]),
    ],
    ids=["three texts", "one text", "texts not known"],
)
def test_the_margin_is_that_of_the_difference_over_texts_else_windows(texts, units):
    margins = difference_margins(importance(texts))
    for i, j in ((0, 1), (0, 2), (2, 1)):
        assert margins[i, j] == pytest.approx(by_hand(units, i, j), rel=1e-5)
        assert margins[i, j] == pytest.approx(float(margins[j, i]), rel=1e-9)
    assert (margins.diagonal() == 0).all()


def test_what_moves_both_layers_alike_cancels():
    found = importance(None)
    assert difference_margins(found)[0, 1] < 0.2 * float(found.margin[0])
    assert difference_margins(found, 0.5)[0, 1] < difference_margins(found)[0, 1]


def test_of_one_window_nothing_is_known():
    one = Importance.empty(range(2))
    angles = torch.zeros(1, 3, 3)
    one.add(Scores(tokens=torch.ones(1), influence=torch.ones(1, 2), angles=angles), [0])
    assert difference_margins(one).isnan().all()

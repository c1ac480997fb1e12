"""Methods by name, on scores made by hand."""

from __future__ import annotations

import pytest
import torch

from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import BY_LOSS, METHODS, choose

NUMBERS = [0, 2, 3, 5, 8, 9]  # a model that has lost layers before


def scored() -> Importance:
    """One window of 2 tokens."""
    sums = Importance.empty(NUMBERS)
    angles = torch.full((1, 7, 7), 0.5)
    angles[0, 1, 3] = 0.1  # places 1 and 2
    influence = torch.tensor([[0.9, 0.3, 0.5, 0.1, 0.4, 0.8]])
    magnitude = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.4, 0.8]])
    norm = torch.tensor([[1.0, 2.0, 9.0, 4.0, 5.0, 6.0]])
    metrics = torch.stack((magnitude, norm), dim=1)  # (1, 2, 6)
    sums.add(Scores(torch.tensor([2]), influence, angles, metrics))
    return sums


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("bi", [5, 2]),
        ("angular", [2, 3]),
        ("deepest", [5, 8]),
        ("relative_magnitude", [3, 5]),
        ("norm", [3, 9]),
        ("sequential", [0, 2]),
        ("reverse", [9, 8]),
    ],
)
def test_each_takes_its_layers_in_original_numbers(method, expected):
    assert choose(scored(), 2, method=method) == expected


def test_random_layers_by_their_seed():
    found = [choose(scored(), 3, method="random", seed=s) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert set(found[0]) < set(NUMBERS)


def test_every_method_is_chosen_or_searched():
    for method in METHODS:
        if method in BY_LOSS:
            with pytest.raises(ValueError, match=f"{method} runs the model without layers"):
                choose(scored(), 2, method=method)
        else:
            assert len(choose(scored(), 4, method=method)) == 4


def test_scores_that_lack_what_a_method_reads():
    content = scored().to_dict()
    for method, metric in (("norm", "norm"), ("relative_magnitude", "magnitude")):
        lacking = Importance.from_dict({k: v for k, v in content.items() if k != metric})
        with pytest.raises(ValueError, match=f"needs the metric {metric}, which these scores lack"):
            choose(lacking, 2, method=method)
    with pytest.raises(ValueError, match="no method 'best'; expected one of bi, angular"):
        choose(scored(), 2, method="best")

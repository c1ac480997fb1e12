"""Methods by name: on scores made by hand, on published vectors, on ties and bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import refuses
from hypothesis import given
from hypothesis import strategies as st

from short_gpt.jobs.reproduction import published
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import best_block, lowest
from short_gpt.selection.methods import BY_LOSS, METHODS, WITHOUT_TEXT, choose

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
            refuses(f"{method} runs the model without layers", choose, scored(), 2, method=method)
        else:
            assert len(choose(scored(), 4, method=method)) == 4


def test_scores_that_lack_what_a_method_reads():
    content = scored().to_dict()
    for method, metric in (("norm", "norm"), ("relative_magnitude", "magnitude")):
        lacking = Importance.from_dict({k: v for k, v in content.items() if k != metric})
        refuses(f"needs the metric {metric}, which these", choose, lacking, 2, method=method)
    refuses("no method 'best'; expected one of bi, angular", choose, scored(), 2, method="best")


@pytest.mark.parametrize("model", ["Llama-2-7B", "Mistral-7B-v0.1"])
def test_published_vectors_give_the_published_lists(model):
    run = published()["reimplementation"]["models"][model]
    scores = torch.tensor(run["importance"], dtype=torch.float64)
    assert lowest(scores, 9) == run["removed"]
    angular = torch.full((33, 33), float("nan"), dtype=torch.float64)
    distances = torch.tensor(run["angular_n9"][: 32 - 9 + 1], dtype=torch.float64)
    angular.diagonal(9).copy_(distances)
    assert best_block(angular, 9) == run["removed_angular_n9"]


def test_ties_go_to_the_lower_layer():
    assert lowest(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.2]), 3) == [3, 1, 2]
    assert best_block(torch.zeros(5, 5), 2) == [0, 1]
    scores = torch.arange(40.0) % 2  # beyond 16 values torch keeps the order only if asked to
    assert lowest(scores, 39) == [*range(0, 40, 2), *range(1, 39, 2)]
    assert best_block(torch.zeros(41, 41), 2) == [0, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_block_size_and_the_last_start_are_candidates(n):
    angular = torch.ones(6, 6)
    angular[5 - n, 5] = 0.1  # the block that ends with the last layer
    assert best_block(angular, n) == list(range(5 - n, 5))


@given(st.lists(st.floats(0, 2), min_size=2, max_size=20), st.data())
def test_lowest_is_a_sorted_prefix(scores, data):
    n = data.draw(st.integers(1, len(scores) - 1))
    chosen = lowest(torch.tensor(scores, dtype=torch.float64), n)
    assert [scores[i] for i in chosen] == sorted(scores)[:n]
    assert len(set(chosen)) == n


@pytest.mark.parametrize("n", [0, 5, -1, 2.0, True, None])
def test_n_out_of_range(n):
    refuses(r"n = .*; the model has 5 layers: expected 1 to 4", lowest, torch.arange(5.0), n)
    refuses("expected 1 to 4", best_block, torch.zeros(6, 6), n)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(kind):
    assert lowest(torch.arange(5.0), kind(2)) == [0, 1]
    assert best_block(torch.zeros(6, 6), kind(2)) == [0, 1]
    for method in WITHOUT_TEXT:
        found = of_layers(5, kind(2), method)
        assert found == of_layers(5, 2, method) and all(type(i) is int for i in found)


def test_nan_is_never_selected():
    refuses("must be finite", lowest, torch.tensor([0.1, float("nan"), 0.3]), 1)


def of_layers(count: int, n: int, method: str, seed: int = 0) -> list[int]:
    return choose(Importance.empty(range(count)), n, method=method, seed=seed)


def test_rules_without_scores():
    assert of_layers(32, 8, "deepest") == list(range(23, 31))  # Gromov et al., counted from 0
    assert of_layers(6, 2, "sequential") == [0, 1]
    assert of_layers(6, 3, "reverse") == [5, 4, 3] and len(of_layers(6, 5, "reverse")) == 5
    seeds = [of_layers(30, 8, "random", seed) for seed in (5, 5, 6, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert of_layers(30, 8, "random") == seeds[3] != seeds[4]
    assert len({*of_layers(30, 29, "random")}) == 29


@pytest.mark.parametrize("method", WITHOUT_TEXT)
@pytest.mark.parametrize("n", [0, 6, True])
def test_rules_check_the_number(method, n):
    refuses("the model has 6 layers: expected 1 to 5", of_layers, 6, n, method)


def test_every_random_set_is_equally_likely():
    counts = [0] * 6
    for seed in range(3000):
        for layer in of_layers(6, 2, "random", seed):
            counts[layer] += 1
    assert all(abs(c - 1000) < 100 for c in counts)  # 4 standard deviations

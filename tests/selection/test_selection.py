"""Selections on arrays: published vectors, ties, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from short_gpt.jobs.reproduction import published
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import best_block, lowest
from short_gpt.selection.methods import WITHOUT_TEXT, choose


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
    with pytest.raises(ValueError, match=r"n = .*; the model has 5 layers: expected 1 to 4"):
        lowest(torch.arange(5.0), n)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        best_block(torch.zeros(6, 6), n)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(kind):
    assert lowest(torch.arange(5.0), kind(2)) == [0, 1]
    assert best_block(torch.zeros(6, 6), kind(2)) == [0, 1]
    for method in WITHOUT_TEXT:
        found = of_layers(5, kind(2), method)
        assert found == of_layers(5, 2, method) and all(type(i) is int for i in found)


def test_nan_is_never_selected():
    with pytest.raises(ValueError, match="must be finite"):
        lowest(torch.tensor([0.1, float("nan"), 0.3]), 1)


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
    with pytest.raises(ValueError, match="the model has 6 layers: expected 1 to 5"):
        of_layers(6, n, method)


def test_every_random_set_is_equally_likely():
    counts = [0] * 6
    for seed in range(3000):
        for layer in of_layers(6, 2, "random", seed):
            counts[layer] += 1
    assert all(abs(c - 1000) < 100 for c in counts)  # 4 standard deviations

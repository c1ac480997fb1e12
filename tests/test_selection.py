"""Selections on arrays: published vectors, ties, bounds."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from short_gpt.selection import best_block, lowest


def reimplementation(model: str) -> dict:
    """Vectors and lists that the public reimplementation of ShortGPT printed."""
    text = resources.files("short_gpt").joinpath("published.json").read_text()
    return json.loads(text)["reimplementation"]["runs"][model]


@pytest.mark.parametrize("model", ["Llama-2-7B", "Mistral-7B-v0.1"])
def test_published_vectors_give_the_published_lists(model):
    run = reimplementation(model)
    assert lowest(torch.tensor(run["bi"], dtype=torch.float64), 9) == run["removed"]["bi"]
    n, layers = 9, len(run["bi"])
    angular = torch.full((layers + 1, layers + 1), float("nan"), dtype=torch.float64)
    distances = torch.tensor(run["angular_n9"][: layers - n + 1], dtype=torch.float64)
    angular.diagonal(n).copy_(distances)
    assert best_block(angular, n) == run["removed"]["angular_n9"]


def test_ties_go_to_the_lower_layer():
    assert lowest(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.2]), 3) == [3, 1, 2]
    assert best_block(torch.zeros(5, 5), 2) == [0, 1]


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
    with pytest.raises(ValueError, match=r"n = .* layers to remove of 5: expected 1 to 4"):
        lowest(torch.arange(5.0), n)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        best_block(torch.zeros(6, 6), n)


def test_nan_is_never_selected():
    with pytest.raises(ValueError, match="must be finite"):
        lowest(torch.tensor([0.1, float("nan"), 0.3]), 1)

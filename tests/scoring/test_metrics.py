"""Known answers and invariants of the two distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from short_gpt.scoring.metrics import (
    angle,
    angular_distances,
    block_influence,
    cosine,
    cosine_from_product,
    influence,
    norms,
    relative_change,
    spearman,
    student_t,
)

X = torch.tensor([3.0, 0.0, 4.0])


@pytest.mark.parametrize(
    ("y", "influence", "distance"),
    [
        (X, 0.0, 0.0),
        (7 * X, 0.0, 0.0),
        (torch.tensor([0.0, 2.0, 0.0]), 1.0, 0.5),
        (-X, 2.0, 1.0),
        (torch.tensor([1.0, 0.0, 0.0]), 0.4, math.acos(0.6) / math.pi),
        (torch.zeros(3), 1.0, 0.5),
    ],
)
def test_known_answers(y, influence, distance):
    assert block_influence(X, y).item() == pytest.approx(influence, abs=1e-6)
    assert angle(cosine(X, y)).item() == pytest.approx(distance, abs=2e-4)


def test_two_zero_vectors_are_equal():
    assert block_influence(torch.zeros(3), torch.zeros(3)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_vectors_are_never_nan(dtype):
    x = (torch.randn(500, 576) * 40).to(dtype)
    # arccos turns the last digits of a float32 cosine, 1 - 1e-6, into 1.4e-3 / pi
    assert angle(cosine(x, x)).max() < 5e-4
    assert block_influence(x, x).abs().max() < 1e-6


def test_norms_beyond_float16_are_scored_right():
    x = torch.full((1, 576), 300.0, dtype=torch.float16)  # norm 7200: its square is 5e7
    y = x.clone()
    y[0, ::2] *= -1
    assert block_influence(x, y).item() == pytest.approx(1.0, abs=1e-6)
    assert block_influence(x, y).dtype == torch.float32


@pytest.mark.parametrize("norm", [1e-12, 1e12])
def test_squared_norms_are_not_multiplied(norm):
    """The product of two squared norms would leave float32's range long before the norms do."""
    x, y = torch.tensor([norm, 0.0]), torch.tensor([norm, norm])
    assert cosine(x, y).item() == pytest.approx(math.sqrt(0.5), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad):
    assert cosine(torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0])).isnan()


@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(0.01, 100))
def test_positive_rescaling_changes_nothing(seed, a, b):
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    assert block_influence(a * x, b * y).item() == pytest.approx(
        block_influence(x, y).item(), abs=1e-5
    )


def test_the_cosine_is_per_token_not_of_the_whole():
    x, y = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert block_influence(x, y).tolist() == [0.0, 1.0]


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(0, 2**31))
def test_spearman_is_pearson_of_mean_ranks(values, seed):
    a = np.array(values, dtype=float)
    b = np.random.default_rng(seed).integers(-3, 3, len(a)).astype(float)

    def mean_ranks(v):
        return np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v])

    found = spearman(torch.tensor(a), torch.tensor(b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1], abs=1e-9)


def test_spearman_of_fewer_than_two_or_of_no_number_is_nan():
    assert math.isnan(spearman(torch.zeros(0), torch.zeros(0)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 2.0]), torch.arange(3.0)))


def test_the_parts_that_hooks_call_are_the_equations():
    x, y = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    xy = torch.linalg.vecdot(x, y)
    cos = cosine_from_product(xy, norms(x), norms(y))
    assert torch.equal(cos, cosine(x, y))
    assert torch.equal(influence(cos), block_influence(x, y))
    magnitude = (y - x).norm(dim=-1) / y.norm(dim=-1)
    assert torch.equal(relative_change(norms(y - x), norms(y)), magnitude)
    assert torch.allclose(norms(x) ** 2, (x.double() ** 2).sum(-1).float())


def test_distances_of_all_pairs_are_those_of_single_pairs():
    states = torch.randn(2, 4, 16, dtype=torch.float64)
    found = angular_distances(states)
    for i in range(4):
        for j in range(i + 1, 4):
            expected = angle(cosine(states[:, i], states[:, j]))
            assert torch.allclose(found[:, i, j], expected, atol=1e-12)


def test_what_adds_nothing_to_nothing_has_magnitude_zero():
    change, norm = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 2.0, 0.0])
    assert relative_change(change, norm).tolist() == [0.0, 0.0, math.inf]


def test_student_t_against_tables():
    # Abramowitz and Stegun, table 26.10
    assert student_t(0.995, 30) == pytest.approx(2.750, abs=1e-3)
    assert student_t(0.9995, 60) == pytest.approx(3.460, abs=1e-3)
    assert student_t(0.975, 120) == pytest.approx(1.980, abs=1e-3)

"""Errors and degrees of freedom of a ratio over clusters, against matrices written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from short_gpt.scoring.moments import degrees_of_freedom, ratio_covariance

SIZES = {
    "equal": [4, 4, 4, 4, 4],
    "unequal": [7, 3, 12, 1, 5],
    "one long text": [20, 2, 2],
    "two long texts": [16, 16, 1, 1, 1, 1],
}


def satterthwaite(sizes: list[int]) -> float:
    """Bell and McCaffrey (2002), section 4, of the matrices of the regression on a constant.

    The estimate is a quadratic form in the tokens' values, sum_g w_g (x_g' e)^2 with e = (I - H) y,
    H the hat matrix and x the constant. With eigenvalues of the form under independent values,
    its degrees of freedom are (sum of them)^2 / sum of their squares.
    """
    count, groups = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    residual = np.eye(count) - np.full((count, count), 1 / count)  # I - H
    form = np.zeros((count, count))
    for group, size in enumerate(sizes):
        # (I - H_gg)^-1 x_g, the correction of CR3, as a whole matrix
        own = np.zeros(count)
        hat = np.full((size, size), 1 / count)
        own[groups == group] = np.linalg.solve(np.eye(size) - hat, np.ones(size))
        row = residual @ own
        form += np.outer(row, row)
    values = np.linalg.eigvalsh(form)
    return values.sum() ** 2 / np.square(values).sum()


@pytest.mark.parametrize("name", SIZES)
def test_degrees_of_freedom_are_those_of_bell_and_mccaffrey(name):
    sizes = SIZES[name]
    found = degrees_of_freedom(torch.tensor(sizes))
    assert found == pytest.approx(satterthwaite(sizes), rel=1e-9)
    assert degrees_of_freedom(torch.tensor(sizes) * 512) == pytest.approx(found, rel=1e-9)
    assert 1 <= found <= len(sizes) - 1 + 1e-9


@pytest.mark.parametrize("count", [2, 3, 20])
def test_equal_clusters_have_one_degree_less_than_their_number(count):
    assert degrees_of_freedom(torch.full((count,), 9.0)) == pytest.approx(count - 1)


def test_clusters_without_tokens_count_for_nothing():
    assert degrees_of_freedom(torch.tensor([4, 0, 4, 0])) == pytest.approx(1)
    assert degrees_of_freedom(torch.tensor([4, 0])) == 0
    sums, sizes = torch.tensor([[1.0], [0.0], [3.0]]).double(), torch.tensor([2.0, 0.0, 2.0])
    expected = ratio_covariance(sums[[0, 2]], sizes[[0, 2]])
    assert torch.equal(ratio_covariance(sums, sizes.double()), expected)


@pytest.mark.parametrize("name", SIZES)
def test_the_covariance_is_that_of_leaving_out_one_cluster_after_the_other(name):
    sizes = torch.tensor(SIZES[name]).double()
    sums = torch.randn(len(sizes), 3, generator=torch.Generator().manual_seed(0)).double()
    ratios = sums.sum(0) / sizes.sum()
    without = (sums.sum(0) - sums) / (sizes.sum() - sizes)[:, None] - ratios  # (G, 3)
    expected = without.T @ without * (len(sizes) - 1) / len(sizes)
    assert torch.allclose(ratio_covariance(sums, sizes), expected, rtol=1e-12)


def test_of_equal_clusters_it_is_the_covariance_of_their_means():
    means = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    found = ratio_covariance(5 * means, torch.full((6,), 5.0).double())
    assert torch.allclose(found, means.T.cov() / 6, rtol=1e-12)
    assert ratio_covariance(means[:1], torch.ones(1).double()).isnan().all()
    assert math.isclose(float(found[0, 1]), float(found[1, 0]))

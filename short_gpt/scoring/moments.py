"""Moments of windows' scores: how much, and how lopsidedly, the difference of two layers varies.

Leading dimensions are batches. L scores, as of layers or of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cube_sums(sums: Tensor) -> Tensor:
    """What windows add to ``Importance.cubes``: third moments from which those of pairs follow.

    Args:
        sums: of each window, its L sums and its tokens, (B, L + 1).

    Returns:
        Sums over windows of s_i^2 s_j, and of t s_i s_j, t a window's tokens, stacked:
        (2, L + 1, L + 1).
    """
    # t is the last column; (L + 1, B) (B, L + 1) each
    return torch.stack((sums.square().T @ sums, sums.T @ (sums * sums[:, -1:])))


def block_sums(angles: Tensor) -> tuple[Tensor, Tensor]:
    """What windows' distances (B, L + 1, L + 1) add to the products and cubes of all blocks.

    Returns:
        Sums over windows of a_l a_m and of a_l^2 a_m, where a_l is the distance of the block of n
        layers from l on: entry [n - 1, l, m], (L, L, L) each.
    """
    L = angles.shape[1] - 1
    products = torch.zeros(L, L, L, dtype=torch.float64)
    cubes = torch.zeros_like(products)
    for n in range(1, L + 1):
        blocks = angles.diagonal(n, dim1=1, dim2=2)  # (B, L - n + 1), by the block's start
        starts = L - n + 1
        products[n - 1, :starts, :starts] = blocks.T @ blocks
        cubes[n - 1, :starts, :starts] = blocks.square().T @ blocks
    return products, cubes


def with_count(values: Tensor, sums: Tensor, count: int) -> Tensor:
    """Sums of products (L, L) as if each window also had the sum 1, one token: (L + 1, L + 1)."""
    last = torch.full((1,), float(count), dtype=values.dtype)  # sum of 1 x 1 over the windows
    return torch.cat(
        (torch.cat((values, sums[:, None]), 1), torch.cat((sums, last))[None, :]), dim=0
    )


def residual_cubes(mean: Tensor, cubes: Tensor, weighted: Tensor) -> Tensor:
    """Sums over windows of r_i^2 r_j, with r = a window's sums - its tokens t x the mean.

    Args:
        mean: (..., L).
        cubes, weighted: sums over windows of s_i^2 s_j and of t s_i s_j, s a window's L sums and
            t, (..., L + 1, L + 1).

    Returns:
        (..., L, L).
    """
    i, j = mean[..., :, None], mean[..., None, :]
    # (s_i - t m_i)^2 (s_j - t m_j), multiplied out over sums that are kept
    squares, tokens = cubes[..., :-1, -1:], cubes[..., -1:, -1:]  # of s_i^2 t, of t^3
    each = weighted[..., :-1, -1:]  # of t^2 s_i
    found = cubes[..., :-1, :-1] - j * squares - 2 * i * weighted[..., :-1, :-1]
    return found + 2 * i * j * each + i**2 * each.mT - i**2 * j * tokens


def pair_spread(covariance: Tensor) -> Tensor:
    """var(b - a) = var(a) + var(b) - 2 cov(a, b) for all pairs: what they share cancels.

    Args:
        covariance: (..., L, L).
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return (variance[..., :, None] + variance[..., None, :] - 2 * covariance).clamp(min=0)


def pair_skewness(covariance: Tensor, cubes: Tensor, count: int) -> Tensor:
    """Skewness over windows of the difference of each two entries.

    Args:
        covariance: of the means over so many windows, (..., L, L).
        cubes: of `residual_cubes`, in the unit of the means, (..., L, L).
        count: windows, at least 2.

    Returns:
        (..., L, L): entry [i, j] is that of r_j - r_i, m3 / m2^1.5; 0 where the two are equal.
    """
    own = cubes.diagonal(dim1=-2, dim2=-1)
    # (b - a)^3 = b^3 - 3 b^2 a + 3 a^2 b - a^3
    third = own[..., None, :] - own[..., :, None] + 3 * (cubes - cubes.mT)
    second = pair_spread(covariance) * (count - 1)
    skewness = third / count / second**1.5
    return torch.where(second > 1e-15, skewness, 0.0)  # rounding leaves that much of no variance

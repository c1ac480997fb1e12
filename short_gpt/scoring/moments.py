"""Sums over windows, and over the texts they come from: covariance, skewness, degrees of freedom.

Shapes: B windows, G texts (clusters of windows), L scores, as of layers or of blocks; leading
dimensions are batches. The sums of a window or a text are its L scores, then its tokens, (L + 1,).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Texts = Mapping[int, Tensor]  # sums (L + 1,) by a text's number; None where texts are not known


def add_texts(texts: Texts | None, more: Iterable[tuple[int | None, Tensor]]) -> Texts | None:
    """New sums with ``more`` added to ``texts``; once one text's number is not known, none is."""
    if texts is None:
        return None
    total = dict(texts)
    for number, sums in more:  # sums (L + 1,)
        if number is None:
            return None
        number = int(number)  # of NumPy, which JSON does not take
        total[number] = total[number] + sums if number in total else sums.clone()
    return total


def merge_texts(parts: Sequence[Texts | None]) -> Texts | None:
    """The sums of all parts, such as those of several replicas; the same number is one text."""
    total: Texts | None = {}
    for part in parts:
        total = None if part is None else add_texts(total, part.items())
        if total is None:
            break
    return total


def next_number(texts: Texts | None) -> int:
    """The first number above those of all texts."""
    return max(texts or (), default=-1) + 1


def ratio_covariance(sums: Tensor, sizes: Tensor) -> Tensor:
    """The jackknife's covariance (L, L) of ratios of totals, sum S / sum t, leaving out clusters.

    Without cluster g, the ratios m are those of all less r / (T (1 - p)), with r = S - m t of this
    cluster, T = sum t and p = t / T its share. So it is (G - 1) / G sum r r^T / (1 - p)^2 / T^2.
    For clusters of one size that is G / (G - 1) sum r r^T / T^2, which is too small where one text
    is much longer than others, because the ratio follows it (CR3 in Bell and McCaffrey, Survey
    Methodology 28, 2002). The sums S are (G, L), float64, the sizes t (G,); size 0 does not count.
    """
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]  # (G, L), (G,)
    count, total = len(sizes), sizes.sum()
    if count < 2:
        return torch.full((sums.shape[1],) * 2, math.nan, dtype=torch.float64)
    rest = (total - sizes)[:, None]  # (G, 1)
    change = (sums - sums.sum(0) / total * sizes[:, None]) / rest  # r / (T (1 - p)), (G, L)
    return change.T @ change * ((count - 1) / count)  # (L, G) (G, L)


def degrees_of_freedom(sizes: Tensor) -> float:
    """Of Student's t for an error by `ratio_covariance`: G - 1 if all sizes (G,) are equal.

    By Bell and McCaffrey (2002), twice the squared mean of the variance's estimate over the
    variance of that, where the tokens' errors are independent and alike: with o = p / (1 - p) it
    is (sum o)^2 / ((sum o^2)^2 - sum o^4 + sum o^2). It is near 1 where one text has nearly all,
    and 0 for fewer than two clusters; those of size 0 count for nothing.

    Example:
        >>> round(degrees_of_freedom(torch.tensor([20.0, 2.0, 2.0])), 2)
        1.04
    """
    sizes = sizes[sizes > 0].double()  # (G,)
    if len(sizes) < 2:
        return 0.0
    odds = sizes / (sizes.sum() - sizes)  # o = p / (1 - p), (G,)
    squares = odds.square()  # (G,)
    spread = squares.sum() ** 2 - squares.square().sum() + squares.sum()
    return float(odds.sum() ** 2 / spread)


def cube_sums(sums: Tensor) -> Tensor:
    """Sums over windows (B, L + 1) of s_i^2 s_j and t s_i s_j, t the tokens: (2, L + 1, L + 1)."""
    # t is the last column; (L + 1, B) (B, L + 1) each
    return torch.stack((sums.square().T @ sums, sums.T @ (sums * sums[:, -1:])))


def block_sums(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over windows (B, L + 1, L + 1) of a_l a_m and of a_l^2 a_m, (L, L, L) each.

    a_l is the distance of the block of n layers from l on: entry [n - 1, l, m].
    """
    L = angles.shape[1] - 1
    products = torch.zeros(L, L, L, dtype=torch.float64)
    cubes = torch.zeros_like(products)  # (L, L, L)
    for n in range(1, L + 1):
        blocks = angles.diagonal(n, dim1=1, dim2=2)  # (B, L - n + 1), by the block's start
        starts = L - n + 1
        products[n - 1, :starts, :starts] = blocks.T @ blocks
        cubes[n - 1, :starts, :starts] = blocks.square().T @ blocks
    return products, cubes


def with_count(values: Tensor, sums: Tensor, count: int) -> Tensor:
    """Sums of products (L, L) as if each window also had the sum 1, one token: (L + 1, L + 1)."""
    last = torch.full((1,), float(count), dtype=values.dtype)  # sum of 1 x 1 over the windows
    wide = torch.cat((values, sums[:, None]), dim=1)  # (L, L + 1)
    return torch.cat((wide, torch.cat((sums, last))[None, :]), dim=0)


def residual_cubes(mean: Tensor, cubes: Tensor, weighted: Tensor) -> Tensor:
    """Sums over windows of r_i^2 r_j, (..., L, L), with r = a window's sums - its tokens t x mean.

    From sums over windows of s_i^2 s_j (``cubes``) and of t s_i s_j (``weighted``), s a window's
    L sums and t, (..., L + 1, L + 1) each.
    """
    i, j = mean[..., :, None], mean[..., None, :]  # (..., L, 1), (..., 1, L)
    # (s_i - t m_i)^2 (s_j - t m_j), multiplied out over sums that are kept
    squares, tokens = cubes[..., :-1, -1:], cubes[..., -1:, -1:]  # of s_i^2 t, of t^3
    each = weighted[..., :-1, -1:]  # of t^2 s_i, (..., L, 1)
    third = cubes[..., :-1, :-1] - j * squares - 2 * i * weighted[..., :-1, :-1]  # (..., L, L)
    return third + 2 * i * j * each + i**2 * each.mT - i**2 * j * tokens


def pair_spread(covariance: Tensor) -> Tensor:
    """var(b - a) = var(a) + var(b) - 2 cov(a, b) of all pairs, (..., L, L): shared parts cancel."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)  # (..., L)
    return (variance[..., :, None] + variance[..., None, :] - 2 * covariance).clamp(min=0)


def pair_skewness(covariance: Tensor, cubes: Tensor, count: int) -> Tensor:
    """Skewness over windows of the difference of each two entries, m3 / m2^1.5, (..., L, L).

    Entry [i, j] is that of r_j - r_i, 0 where these are equal. The covariance is of the means over
    ``count`` windows, ``cubes`` are of `residual_cubes` in the means' unit, (..., L, L) each.
    """
    single = cubes.diagonal(dim1=-2, dim2=-1)  # (..., L)
    # (b - a)^3 = b^3 - 3 b^2 a + 3 a^2 b - a^3
    third = single[..., None, :] - single[..., :, None] + 3 * (cubes - cubes.mT)  # (..., L, L)
    second = pair_spread(covariance) * (count - 1)  # (..., L, L)
    skewness = third / count / second**1.5
    return torch.where(second > 1e-15, skewness, 0.0)  # rounding leaves that much of no variance

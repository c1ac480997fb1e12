"""Sums of scores by the text that windows were cut from, and the error of means over such texts.

Shapes: L layers. A text's sums are those of influence of every layer, then its tokens, (L + 1,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.lists import from_lists, layer_numbers, to_lists

Texts = Mapping[int, Tensor]  # sums by a text's number; None in its place where that is not known


def with_windows(texts: Texts | None, of: Sequence[int | None], sums: Tensor) -> Texts | None:
    """The sums with those of more windows; once a window's text is not known, none is.

    Args:
        texts: so far; it stays as it is.
        of: the windows' texts.
        sums: of each window, (B, L + 1).
    """
    if texts is None or None in of:
        return None
    found = dict(texts)
    for text, own in zip(of, sums, strict=True):
        found[int(text or 0)] = found[int(text or 0)] + own if text in found else own.clone()
    return found


def next_number(texts: Texts | None) -> int:
    """The first number that is above those of all texts."""
    return max(texts or (), default=-1) + 1


def apart(first: Texts | None, second: Texts | None) -> Texts | None:
    """The sums of both, whose texts are different ones: the second's get numbers of their own."""
    if first is None or second is None:
        return None
    start = next_number(first)  # numbers begin at 0 in every call of `data.windows`
    return {**first, **{start + text: own for text, own in second.items()}}


def merged(parts: Sequence[Texts | None]) -> Texts | None:
    """The sums of all parts, such as those of several replicas; the same number is one text."""
    found: dict[int, Tensor] = {}
    for part in parts:
        if part is None:
            return None
        for text, own in part.items():
            found[text] = found[text] + own if text in found else own
    return found


def covariance_over_texts(texts: Texts) -> Tensor:
    """Covariance of the means of all layers over all tokens, (L, L); texts are the samples."""
    each = torch.stack(list(texts.values()))  # (G, L + 1)
    return ratio_covariance(each[:, :-1], each[:, -1])


def degrees_over_texts(texts: Texts) -> float:
    """The degrees of freedom of `covariance_over_texts`."""
    return degrees_of_freedom(torch.tensor([float(own[-1]) for own in texts.values()]))


def ratio_covariance(sums: Tensor, sizes: Tensor) -> Tensor:
    """The jackknife's covariance of ratios of totals, sum S / sum t, over samples of clusters.

    Without cluster g, the ratios m are those of all less r / (T (1 - p)), with r = S - m t of this
    cluster, T = sum t and p = t / T its share. So it is (G - 1) / G sum r r^T / (1 - p)^2 / T^2,
    which of clusters of one size is G / (G - 1) sum r r^T / T^2. Where one text is much longer
    than others, the latter is too small, as the ratio follows that text (CR3 in Bell and
    McCaffrey, Survey Methodology 28, 2002).

    Args:
        sums: of every cluster, (G, L), float64.
        sizes: what they are divided by, (G,); those of size 0 count for nothing.

    Returns:
        (L, L); NaN for fewer than two clusters.
    """
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]  # (G, L), (G,)
    count, total = len(sizes), sizes.sum()
    if count < 2:
        return torch.full((sums.shape[1],) * 2, math.nan, dtype=torch.float64)
    rest = (total - sizes)[:, None]  # (G, 1)
    change = (sums - sums.sum(0) / total * sizes[:, None]) / rest  # r / (T (1 - p)), (G, L)
    return change.T @ change * ((count - 1) / count)  # (L, G) (G, L)


def degrees_of_freedom(sizes: Tensor) -> float:
    """Of Student's t for an error by `ratio_covariance`: clusters less 1 if all have one size.

    By Bell and McCaffrey (2002), twice the squared mean of the variance's estimate over the
    variance of that, where the tokens' errors are independent and alike: with o = p / (1 - p) it
    is (sum o)^2 / ((sum o^2)^2 - sum o^4 + sum o^2). It is near 1 where one text has nearly all.

    Args:
        sizes: of the clusters, (G,); those of size 0 count for nothing.

    Returns:
        From 1 to G - 1; 0 for fewer than two clusters.

    Example:
        >>> round(degrees_of_freedom(torch.tensor([5.0, 5.0, 5.0, 5.0])), 6)
        3.0
        >>> round(degrees_of_freedom(torch.tensor([20.0, 2.0, 2.0])), 2)
        1.04
    """
    sizes = sizes[sizes > 0].double()
    if len(sizes) < 2:
        return 0.0
    odds = sizes / (sizes.sum() - sizes)  # o = p / (1 - p), (G,)
    squares = odds.square()
    spread = squares.sum() ** 2 - squares.square().sum() + squares.sum()
    return float(odds.sum() ** 2 / spread)


def to_json(texts: Texts | None) -> dict[str, object] | None:
    """Numbers and sums, every digit kept; None where the texts are not known."""
    if texts is None:
        return None
    return {"numbers": list(texts), "sums": [to_lists(own) for own in texts.values()]}


def from_json(content: object, total: Tensor) -> Texts | None:
    """What `to_json` wrote.

    Args:
        content: None counts as not known, as in files of earlier versions.
        total: sums of all windows, (L + 1,).

    Raises:
        ShortGPTError: it did not, or the texts' sums are not those of all windows.
    """
    if content is None:
        return None
    try:
        numbers, sums = _parts(content)
    except (KeyError, TypeError, ValueError, OverflowError):
        numbers, sums = [-1], total[None]
    fits = sums.shape == (len(numbers), len(total)) and bool((sums >= 0).all())
    if not fits or not torch.allclose(sums.sum(0), total, rtol=1e-6, atol=1e-9) or -1 in numbers:
        raise ShortGPTError(
            "these are not saved scores: texts has no different numbers of texts with sums of "
            "each that make up those of all windows"
        )
    return dict(zip(numbers, sums, strict=True))


def _parts(content: object) -> tuple[list[int], Tensor]:
    """Numbers of texts, and the sums of each."""
    if not isinstance(content, dict):
        raise TypeError
    numbers = layer_numbers(content["numbers"])  # the same rule: whole, from 0, each once
    return numbers, from_lists(content["sums"])

"""Sums of scores by the text that windows were cut from, and the error of means over such texts.

Shapes: L layers. A text's sums are those of influence of every layer, then its tokens, (L + 1,).
"""

from __future__ import annotations

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
    start = next_number(first)
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


def error_over_texts(texts: Texts) -> Tensor:
    """The standard error of the mean of every layer over all tokens, (L,), of two texts or more."""
    return covariance_over_texts(texts).diagonal().clamp(min=0).sqrt()


def covariance_over_texts(texts: Texts) -> Tensor:
    """Covariance of the means of all layers over all tokens, texts being the samples.

    With S the sums of a text, t its tokens and G texts, it is G / (G - 1) sum (S - m t) (S - m t)^T
    / (sum t)^2; its diagonal is that of `evaluation.sampling.sampling_error`, a ratio of totals of
    clusters.

    Args:
        texts: at least two.

    Returns:
        (L, L).
    """
    each = torch.stack(list(texts.values()))  # (G, L + 1)
    sums, tokens, count = each[:, :-1], each[:, -1:], len(each)
    residual = sums - sums.sum(0) / tokens.sum() * tokens
    return residual.T @ residual * (count / (count - 1) / tokens.sum() ** 2)


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

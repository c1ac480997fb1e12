"""Sums as lists of numbers, ready for JSON, which has no NaN: None stands for it; and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.metrics import LAYER_METRICS
from short_gpt.scoring.moments import Texts

COUNTS = ("windows", "tokens")
FIRST = ("magnitude", "norm")  # metrics that every file has
LATER = ("cubes", "angle_cubes")  # files of earlier versions lack them: NaN, which settles nothing
# NaN where a window was not scored so; "halves" is what files call the sublayers
PARTLY = ("halves", "token_angles", *LATER)
Nested = float | None | list["Nested"]  # numbers in lists in lists


def to_lists(values: Tensor) -> Nested:
    """A tensor as lists, every digit kept; None for NaN."""
    return _without_nan(values.tolist())


def _without_nan(values: Nested) -> Nested:
    if isinstance(values, list):
        return [_without_nan(v) for v in values]
    return None if values is None or math.isnan(values) else values


def from_lists(content: object) -> Tensor:
    """The tensor in float64 that `to_lists` wrote; TypeError or ValueError if it did not."""
    return torch.tensor(_with_nan(content), dtype=torch.float64)


def _with_nan(content: object) -> object:
    if isinstance(content, list):
        return [_with_nan(v) for v in content]
    if isinstance(content, bool):  # which is a number to torch
        raise TypeError(f"expected numbers, got {content}")
    return math.nan if content is None else content


def layer_numbers(content: object) -> list[int]:
    """The layers of saved scores; TypeError if they are no list of numbers, each once."""
    if not isinstance(content, list) or not all(type(i) is int and i >= 0 for i in content):
        raise TypeError(f"layers = {content!r}, expected whole numbers from 0")
    if len(set(content)) < len(content):
        raise TypeError(f"layers = {content!r}, expected each once")
    return content


def saved_sums(content: Mapping[str, object], name: str, empty: Tensor) -> Tensor:
    """Sums of a saved file, of the shape of ``empty``; NaN where an earlier version lacks them."""
    if name not in content:
        if name in LATER or (name in LAYER_METRICS and name not in FIRST):
            return torch.full_like(empty, math.nan)
        raise ShortGPTError(f"these are not saved scores: they lack {name}")
    try:
        sums = from_lists(content[name])
    except (TypeError, ValueError, OverflowError):
        raise ShortGPTError(
            f"these are not saved scores: {name} is not made of numbers in rows of one length"
        ) from None
    if sums.shape != empty.shape:
        raise ShortGPTError(f"{name} is {list(sums.shape)}, expected {list(empty.shape)}")
    return sums


def check_sums(sums: Mapping[str, Tensor]) -> None:
    """Raises ShortGPTError for sums of `Importance`, by their names, that no model can give."""
    tokens, windows = sums["tokens"], sums["windows"].sum()
    most = {
        "influence": 2 * tokens[:, None],  # 1 - cos of every token, Eq. 1
        "angles": windows,  # arccos / pi of every window, Eq. 6
        "halves": 2 * tokens.sum(),
        "token_angles": tokens.sum(),
    }
    for name, values in sums.items():
        partly = name in PARTLY or name in LAYER_METRICS
        known = values.where(~values.isnan(), 0) if partly else values
        fits = known.isfinite() & (known >= 0)
        if name in COUNTS:
            fits &= (known == known.round()) & (known < 2**53)  # which float64 counts to
        if name in most:
            fits &= known <= most[name] * (1 + 1e-9)
        if not fits.all():
            odd = float(known[~fits][0])
            raise ShortGPTError(f"these are not saved scores: {name} has {odd:g}, out of range")


def texts_to_json(texts: Texts | None) -> dict[str, object] | None:
    """Numbers and sums of texts, every digit kept; None where the texts are not known."""
    if texts is None:
        return None
    return {"numbers": list(texts), "sums": [to_lists(own) for own in texts.values()]}


def texts_from_json(content: object, total: Tensor) -> Texts | None:
    """What `texts_to_json` wrote, whose sums must add up to ``total``, (L + 1); None: not known."""
    if content is None:
        return None
    try:
        if not isinstance(content, dict):
            raise TypeError
        # the same rule as of layers: whole, from 0, each once
        numbers, sums = layer_numbers(content["numbers"]), from_lists(content["sums"])  # (G, L + 1)
        if not numbers:  # of nothing read yet: an empty list has one dimension
            sums = sums.reshape(0, len(total))
    except (KeyError, TypeError, ValueError, OverflowError):
        numbers, sums = [], total[None, None]  # of a shape that is refused below
    fits = sums.shape == (len(numbers), len(total)) and bool((sums >= 0).all())
    if not fits or not torch.allclose(sums.sum(0), total, rtol=1e-6, atol=1e-9):
        raise ShortGPTError(
            "these are not saved scores: texts has no different numbers of texts with sums of "
            "each that make up those of all windows"
        )
    return dict(zip(numbers, sums, strict=True))

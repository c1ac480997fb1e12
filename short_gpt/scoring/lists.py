"""Sums as lists of numbers, ready for JSON, which has no NaN: None stands for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Nested = float | None | list["Nested"]  # numbers in lists in lists


def to_lists(values: Tensor) -> Nested:
    """A tensor as lists, every digit kept.

    Example:
        >>> to_lists(torch.tensor([[0.5, math.nan]]))
        [[0.5, None]]
    """
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
    return math.nan if content is None else content


def layer_numbers(content: object) -> list[int]:
    """The layers of saved scores; TypeError if they are no list of different numbers."""
    numbers = isinstance(content, list) and all(type(i) is int and i >= 0 for i in content)
    if not isinstance(content, list) or not numbers or len(set(content)) != len(content):
        raise TypeError(f"layers = {content!r}")
    return content

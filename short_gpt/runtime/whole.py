"""Whole numbers of Python, numpy and torch alike."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any, TypeVar, cast

T = TypeVar("T")


def whole(number: T) -> T:
    """A whole number of any kind as an int; anything else, True and False as they are.

    Example:
        >>> import torch
        >>> whole(torch.tensor(3)), whole(True), whole(2.5), whole(None)
        (3, True, 2.5, None)
    """
    if not isinstance(number, bool):
        with suppress(TypeError):
            return cast("T", operator.index(cast("Any", number)))
    return number

"""Whole numbers, of Python, numpy and torch alike: made plain, and checked."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any, TypeVar, cast

from llama.args import MAX_INTEGER, short_repr
from short_gpt.runtime.errors import ShortGPTError

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


def at_least(least: int, *, optional: bool = False, **numbers: object) -> None:
    """Raises ShortGPTError unless these are whole numbers from ``least`` to `MAX_INTEGER`.

    ``optional``: whether None passes.
    """
    for name, value in numbers.items():
        if value is None and optional:
            continue
        number = whole(value)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ShortGPTError(f"{name} = {value!r}: expected a whole number of at least {least}")
        if number > MAX_INTEGER:
            raise ShortGPTError(f"{name} = {value}: expected at most {MAX_INTEGER}")


def check_numbers(**values: object) -> None:
    """Raises ShortGPTError unless these are numbers, or None."""
    for name, value in values.items():
        if not (value is None or hasattr(value, "__float__")):
            raise ShortGPTError(f"`{name}` = {short_repr(value)}: expected a number")

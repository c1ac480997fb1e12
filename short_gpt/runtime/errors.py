"""Errors that a user causes and can fix, and the checks of settings that raise them.

Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import operator
import re
from contextlib import suppress
from typing import Any, TypeVar, cast

from llama.args import MAX_INTEGER
from llama.errors import InputError, MissingPackageError, check, damaged, refused, required

__all__ = ["USER_ERRORS", "MissingPackageError", "NotFiniteError", "NotSavedError", "ShortGPTError"]
__all__ += ["at_least", "check", "check_numbers", "damaged", "one_line", "refused", "required"]
__all__ += ["shortage", "whole", "without_password"]

T = TypeVar("T")

# A ``ValueError``; both packages raise this one class.
ShortGPTError = InputError


class NotFiniteError(ShortGPTError, FloatingPointError):
    """A weight, a hidden state or a loss is NaN or infinite; the message says where."""


class NotRemovableError(ShortGPTError):
    """These layers cannot be removed together; the message says why."""


class NotSavedError(ShortGPTError, OSError):
    """The result of a long run could not be written; the same call continues from what was kept."""


# What a command reports in one line: input at fault, and what the system says of files and hubs.
USER_ERRORS = (ShortGPTError, OSError)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what would end or spoil a line
WORD, LINE = 300, 1000  # letters of a word and of a line that are shown in full
# What torch, safetensors and the system say; only CUDA has a class of its own for it.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
NO_SPACE = (
    "No space left on device",
    "Disk quota exceeded",
    *("PytorchStreamWriter", ". unexpected pos ", "iostream error"),  # torch's: it has no reason
)


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

    ``optional`` lets None pass.
    """
    for name, value in numbers.items():
        number = whole(value)
        ok = isinstance(number, int) and not isinstance(number, bool) and number >= least
        check(
            ok or (value is None and optional), name, value, f"a whole number of at least {least}"
        )
        check(not ok or cast("int", number) <= MAX_INTEGER, name, value, f"at most {MAX_INTEGER}")


def check_numbers(**values: object) -> None:
    """Raises ShortGPTError unless these are numbers, or None."""
    for name, value in values.items():
        check(value is None or hasattr(value, "__float__"), f"`{name}`", value, "a number")


def without_password(text: str) -> str:
    """A text whose addresses name no user and password, as HF_ENDPOINT may.

    Example:
        >>> without_password("no answer from https://ada:secret@hub.example/api")
        'no answer from https://hub.example/api'
    """
    return re.sub(r"(\w://)[^\s/]+@", r"\1", text)


def one_line(text: str) -> str:
    """A text in one line: control characters are escaped, and too long a text loses its middle.

    Example:
        >>> one_line("a\\nmodel")
        'a\\\\nmodel'
    """
    text = CONTROL.sub(lambda match: ascii(match[0])[1:-1], without_password(text))
    text = re.sub(rf"\S{{{WORD},}}", lambda match: f"{match[0][:150]} ... {match[0][-50:]}", text)
    return text if len(text) <= LINE else f"{text[: LINE - 300]} ... {text[-295:]}"


def shortage(error: BaseException) -> str | None:
    """What to do where memory or disk is missing, in one line; None if none is.

    Causes of the error count too.
    """
    reason = str(error).split("\n")[0]
    if any(part in reason for part in NO_SPACE):
        return f"the disk is full, or cannot be written to ({reason}); free some space"
    known = isinstance(error, RuntimeError | OSError) and any(part in reason for part in NO_MEMORY)
    if known or isinstance(error, MemoryError):
        return (
            f"not enough memory ({reason or 'none left'}); use a smaller --batch_size or --size, "
            "--dtype bfloat16, or --stream (rank, heal, shrink), which holds one layer at a time"
        )
    return None if error.__cause__ is None else shortage(error.__cause__)

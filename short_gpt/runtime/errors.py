"""Errors that a user causes and can mend. Anything else is a defect and keeps its traceback."""

from __future__ import annotations

from llama.errors import InputError, MissingPackageError

__all__ = ["USER_ERRORS", "MissingPackageError", "NotFiniteError", "ShortGPTError"]

# One class for both packages, a ``ValueError``: who catches either catches what both raise.
ShortGPTError = InputError


class NotFiniteError(ShortGPTError, FloatingPointError):
    """A weight, a state or a loss is NaN or infinite; the message says where."""


# What a command reports in one line: input at fault, and what the system says of files and hubs.
USER_ERRORS = (ShortGPTError, OSError)

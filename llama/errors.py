"""What a caller can do wrong and mend, as errors that say how."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong input; the message says what was expected, what came and what to do.

    Example:
        >>> from llama import ModelArgs
        >>> try:
        ...     ModelArgs.from_params({"dim": 64})
        ... except InputError as error:
        ...     print(error)
        params.json lacks ['n_heads', 'n_layers']
    """


class MissingPackageError(InputError, ImportError):
    """An optional package is not installed; the message names what brings it."""

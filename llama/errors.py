"""Errors that a caller can fix; each message says how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


def refused(name: str, value: object, expected: str) -> InputError:
    """The error of a setting's value.

    Example:
        >>> print(refused("tail", "cut", "'drop' or 'keep'"))
        tail = 'cut': expected 'drop' or 'keep'
    """
    return InputError(f"{name} = {short_repr(value)}: expected {expected}")


def check(ok: object, name: str, value: object, expected: str) -> None:
    """Raises `refused` unless a setting's value is ok."""
    if not ok:
        raise refused(name, value, expected)


def damaged(file: object, reason: object = "", *, mend: str = "write it again") -> InputError:
    """The error of a file that does not hold what was once written there.

    Example:
        >>> print(damaged("scores.json"))
        scores.json is damaged: write it again
    """
    return InputError(f"{file} is damaged{reason and f' ({reason})'}: {mend}")


def check_file(ok: object, file: object, reason: str) -> None:
    """Raises `damaged` unless what a file holds is ok."""
    if not ok:
        raise damaged(file, reason)


def short_repr(value: object) -> str:
    """A value for a message; of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


class MissingPackageError(InputError, ImportError):
    """A package cannot be imported; the message names the command that installs it."""


@contextmanager
def required(package: str, *, by: str) -> Iterator[None]:
    """Around an import: where it fails, a MissingPackageError says how to install the package.

    Args:
        package: as the registry calls it. This library is on no registry, and so its extras are not
            named: the command must work from a checkout and from a wheel.
        by: what needs the package.

    Example:
        >>> try:
        ...     with required("no-package", by="this example"):
        ...         import no_package
        ... except MissingPackageError as error:
        ...     print(error)
        this example needs no-package (No module named 'no_package'): pip install no-package
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"{by} needs {package} ({error}): pip install {package}"
        ) from None

"""What a file of `rank` holds, checked as it is read: people edit such files."""

from __future__ import annotations

from collections.abc import Mapping

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import read_record
from short_gpt.scoring.importance import Importance


def importance_of(record: Mapping[str, object], source: str) -> Importance:
    """The scores in a record that `rank` wrote; raises ShortGPTError if there are none."""
    found = record.get("importance")
    if not isinstance(found, dict):
        raise ShortGPTError(f"{source} holds no scores; expected a file written by short-gpt rank")
    try:
        return Importance.from_dict(found)
    except ShortGPTError as error:
        raise ShortGPTError(f"{source}: {error}") from None


def object_in(record: Mapping[str, object], key: str, file: str) -> Mapping[str, object]:
    """An entry that holds an object; a missing one is empty."""
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise no_scores(file, f"an object as {key}")
    return value


def no_scores(file: str, expected: str) -> ShortGPTError:
    return ShortGPTError(
        f"{file} is not as short-gpt rank writes it: expected {expected}; rank again"
    )


def read_scores(file: str) -> Importance:
    """The scores in a file that `rank` wrote.

    Raises:
        FileNotFoundError, ShortGPTError: no such file, or no scores of one pass in it.
    """
    return importance_of(read_record(file), file)

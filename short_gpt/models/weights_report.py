"""What transformers says of weights it loaded: any but all of them, in their shapes, are refused.

Left to itself it fills what is missing with random numbers and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from short_gpt.runtime.errors import ShortGPTError

# How its own reports of the same begin, in versions 5 and 4; and of a tokenizer.model, where it
# tries two kinds of file and `load_tokenizer` says what was wrong if neither fits.
REPORTS = (" LOAD REPORT", "Some weights of ", "Could not extract SentencePiece model")
LOGGERS = ("modeling_utils", "tokenization_utils_tokenizers")


class _NoReport(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(report in record.getMessage() for report in REPORTS)


@contextmanager
def without_report() -> Iterator[None]:
    """Keeps transformers from printing its reports, which become errors here."""
    loggers, quiet = [logging.getLogger(f"transformers.{name}") for name in LOGGERS], _NoReport()
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)


def check_weights(name: str, info: Mapping[str, Collection[object]]) -> None:
    """Refuses a model whose files do not hold exactly its weights.

    Args:
        name: where the model came from.
        info: what ``from_pretrained`` gives with ``output_loading_info``; tied weights and keys
            that a class of transformers leaves out on purpose are not in it.

    Raises:
        ShortGPTError: tensors are missing, not the model's or of another shape; it names them.
    """
    wrong = [
        f"{text} {some(info[key])}"
        for key, text in (
            ("missing_keys", "lack"),
            ("unexpected_keys", "hold, not of the model its config describes,"),
        )
        if info.get(key)
    ]
    for entry in sorted(map(_Mismatch.of, info.get("mismatched_keys", ())))[:1]:
        shapes = f"as {list(entry.stored)}, of which its config makes {list(entry.expected)}"
        wrong.append(f"hold {entry.key} {shapes}")
    # torch's messages have many lines; the first says enough
    wrong += [" ".join(str(text).split())[:200] for text in info.get("error_msgs", ())][:1]
    if wrong:
        raise ShortGPTError(
            f"{name} cannot be loaded: its files {'; they '.join(wrong)}; fetch or convert it anew"
        )


class _Mismatch(NamedTuple):
    """A tensor of another shape than the config's."""

    key: str
    stored: tuple[int, ...]
    expected: tuple[int, ...]

    @classmethod
    def of(cls, entry: object) -> _Mismatch:
        assert isinstance(entry, tuple)
        return cls(str(entry[0]), tuple(entry[1]), tuple(entry[2]))


def some(names: Collection[object]) -> str:
    """The first three names, and how many more there are."""
    first = sorted(map(str, names))
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return ", ".join(first[:3]) + more

"""Keeping what a model is trained on apart from what it is evaluated on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from short_gpt.runtime.errors import ShortGPTError

SPAN = 64  # tokens; texts that share so many in a row are taken as copies of each other
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers have inverses modulo 2^64
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))

Window = Sequence[int]
W = TypeVar("W", bound=Sequence[int])


def hold_out(
    texts: Sequence[str], *, share: float = 0.1, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Texts to train on and texts to evaluate on; each text goes whole to one side.

    Args:
        texts: at least two.
        share: of all characters that goes to evaluation, about; at least one text does.
        seed: of the choice.

    Raises:
        ShortGPTError: fewer than two texts, or the share is not between 0 and 1.
    """
    if len(texts) < 2:
        raise ShortGPTError(
            f"{len(texts)} text cannot be split into one to train on and one to evaluate on: give "
            "several texts, or a text of its own to evaluate on"
        )
    if not 0 < share < 1:
        raise ShortGPTError(f"share = {share}: expected a number between 0 and 1")
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    wanted, size = share * sum(map(len, texts)), 0
    held: set[int] = set()
    for index in order[:-1]:
        if held and size + len(texts[index]) / 2 > wanted:
            break
        held.add(index)
        size += len(texts[index])
    parts = ([t for i, t in enumerate(texts) if (i in held) == kept] for kept in (False, True))
    training, evaluation = parts
    return training, evaluation


def without_overlap(
    windows: Sequence[W], others: Sequence[Window], *, span: int | None = None
) -> tuple[list[W], int]:
    """The windows that share no text with others, such as those that are evaluated on.

    Args:
        windows, others, span: as in `overlapping`.

    Returns:
        The windows kept, in their order, and how many went.

    Example:
        >>> without_overlap([[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 2, 3]])
        ([[4, 5, 6]], 1)
    """
    shared = overlapping(windows, others, span=span)
    return [window for i, window in enumerate(windows) if i not in shared], len(shared)


def overlapping(
    training: Sequence[Window], evaluation: Sequence[Window], *, span: int | None = None
) -> dict[int, int]:
    """Which windows to train on share text with windows to evaluate on.

    Args:
        training, evaluation: windows of token ids by the same tokenizer.
        span: how many equal tokens in a row are shared text; None is 64, or the longest window's
            length if that is less. Windows shorter than that are compared whole with each other.

    Returns:
        The index of an evaluation window for every training window that shares text with one.
    """
    span = _span(training, evaluation) if span is None else span
    where = _places(evaluation, span)
    known = np.fromiter(where, dtype=np.uint64, count=len(where))
    short = {len(w) for w in evaluation if len(w) < span}
    shared: dict[int, int] = {}
    for number, window in enumerate(training):
        lengths = {span} | (short & {len(window)})
        match = _match(window, lengths, known, where, evaluation)
        if match is not None:
            shared[number] = match
    return shared


def _places(windows: Sequence[Window], span: int) -> dict[int, list[tuple[int, int]]]:
    """By a run's number, the windows and the places in them where it starts."""
    where: dict[int, list[tuple[int, int]]] = {}
    for index, window in enumerate(windows):
        for start, value in enumerate(_hashes(window, min(span, len(window)))):
            where.setdefault(value, []).append((index, start))
    return where


def _span(training: Sequence[Window], evaluation: Sequence[Window]) -> int:
    return min(SPAN, max(map(len, [*training, *evaluation]), default=SPAN))


def check_disjoint(
    training: Sequence[Window], evaluation: Sequence[Window], *, span: int | None = None
) -> None:
    """Raises ShortGPTError if a model would be trained on text that it is evaluated on.

    Arguments as in `overlapping`.
    """
    span = _span(training, evaluation) if span is None else span
    shared = overlapping(training, evaluation, span=span)
    if shared:
        number, other = next(iter(shared.items()))
        raise ShortGPTError(
            f"{len(shared)} of {len(training)} training windows share text with the windows to "
            f"evaluate on ({span} tokens in a row, or a whole shorter window; number {number} with "
            f"evaluation window {other}, for one): healing must not see that text; train on "
            "another, or leave those windows out"
        )


def _match(
    window: Window,
    lengths: set[int],
    known: np.ndarray,
    where: dict[int, list[tuple[int, int]]],
    evaluation: Sequence[Window],
) -> int | None:
    """An evaluation window that has some of this window's spans; equal hashes are compared."""
    for length in lengths:
        if length > len(window):
            continue
        hashes = _hashes(window, length)
        for start in np.flatnonzero(np.isin(hashes, known)).tolist():
            mine = list(window[start : start + length])
            for index, other in where[int(hashes[start])]:
                if list(evaluation[index][other : other + length]) == mine:
                    return index
    return None


def _hashes(window: Window, span: int) -> np.ndarray:
    """A number for every run of ``span`` tokens: sum of x[k] BASE^k over the run, modulo 2^64."""
    # prefix sums give every run by one subtraction; all in uint64, which wraps around as it should
    with np.errstate(over="ignore"):
        tokens = (np.asarray(window, dtype=np.uint64) + np.uint64(1)) * BASE
        tokens ^= tokens >> np.uint64(29)  # mixed, so that near token numbers do not cancel
        powers = np.full(len(tokens), BASE, dtype=np.uint64)
        powers[:1] = 1
        powers = np.cumprod(powers, dtype=np.uint64)
        sums = np.concatenate(([np.uint64(0)], np.cumsum(tokens * powers, dtype=np.uint64)))
        count = len(tokens) - span + 1
        back = np.full(max(count, 0), INVERSE, dtype=np.uint64)
        back[:1] = 1
        return (sums[span:] - sums[:count]) * np.cumprod(back, dtype=np.uint64)

"""Keeping what a model is trained on apart from what it is evaluated on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from short_gpt.data.windows import Window as CutWindow
from short_gpt.runtime.errors import ShortGPTError

SPAN = 64  # tokens; texts that share so many in a row are taken as copies of each other
WHOLE = 8  # tokens; a shorter window stands in many a text that is no copy
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
            length if that is less. A window shorter than that shares its text with one that holds
            it whole, wherever in it; of fewer than 8 tokens, only with its equal.

    Returns:
        The index of an evaluation window for every training window that shares text with one.
    """
    training, evaluation = _bare(training), _bare(evaluation)
    span = _span(training, evaluation) if span is None else span
    shared = dict(_shared(training, evaluation, span, first=True))
    for length in {len(w) for w in [*training, *evaluation] if len(w) < span}:
        # a whole window of this length and any that is long enough to hold it, both ways round
        inside = _shared(training, _of_length(evaluation, length), length)
        around = _shared(evaluation, _of_length(training, length), length)
        for number, other in chain(inside, ((number, other) for other, number in around)):
            if length >= WHOLE or len(training[number]) == len(evaluation[other]):
                shared.setdefault(number, other)
    return shared


def _bare(windows: Sequence[Window]) -> list[Window]:
    """The windows without a bos that was put in front: behind it stands what may be shared."""
    return [w[w.start :] if isinstance(w, CutWindow) else w for w in windows]


def _of_length(windows: Sequence[Window], length: int) -> dict[int, Window]:
    """The windows of one length, by their places."""
    return {i: window for i, window in enumerate(windows) if len(window) == length}


def _shared(
    windows: Sequence[Window],
    others: Sequence[Window] | Mapping[int, Window],
    length: int,
    *,
    first: bool = False,
) -> Iterator[tuple[int, int]]:
    """Windows and the others that have a run of ``length`` tokens in common with them.

    Args:
        windows, others, length: as they are called.
        first: whether one pair is enough for each window.
    """
    numbered = others if isinstance(others, Mapping) else dict(enumerate(others))
    where = _places(numbered, length)
    known = np.fromiter(where, dtype=np.uint64, count=len(where))
    for number, window in enumerate(windows if where else ()):
        for match in islice(_matches(window, length, known, where, numbered), 1 if first else None):
            yield number, match


def _places(windows: Mapping[int, Window], span: int) -> dict[int, list[tuple[int, int]]]:
    """By a run's number, the windows and the places in them where it starts."""
    where: dict[int, list[tuple[int, int]]] = {}
    for index, window in windows.items():
        for start, value in enumerate(_hashes(window, span).tolist()):
            where.setdefault(value, []).append((index, start))
    return where


def _span(training: Sequence[Window], evaluation: Sequence[Window]) -> int:
    return min(SPAN, max(map(len, _bare([*training, *evaluation])), default=SPAN))


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


def _matches(
    window: Window,
    length: int,
    known: np.ndarray,
    where: dict[int, list[tuple[int, int]]],
    others: Mapping[int, Window],
) -> Iterator[int]:
    """The others that have some run of this window; equal hashes are compared."""
    hashes = _hashes(window, length)
    for start in np.flatnonzero(np.isin(hashes, known)).tolist():
        mine = list(window[start : start + length])
        for index, other in where[int(hashes[start])]:
            if list(others[index][other : other + length]) == mine:
                yield index


def _hashes(window: Window, span: int) -> np.ndarray:
    """A number for every run of ``span`` tokens: sum of x[k] BASE^k over the run, modulo 2^64."""
    if len(window) < span:
        return np.empty(0, dtype=np.uint64)
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

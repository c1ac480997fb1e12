"""Keeping what a model is trained on apart from what it is evaluated on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np

from short_gpt.data.windows import Origin
from short_gpt.data.windows import Window as CutWindow
from short_gpt.runtime.errors import ShortGPTError

SPAN = 64  # tokens; texts that share so many in a row are taken as copies of each other
NOBODY = -1  # holds a token that stands between windows
WHOLE = 8  # tokens; fewer stand in many a text that is no copy
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
    windows: Sequence[W], others: Sequence[Window], *, span: int = SPAN
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
    training: Sequence[Window], evaluation: Sequence[Window], *, span: int = SPAN
) -> dict[int, int]:
    """Which windows to train on share text with windows to evaluate on.

    Two windows share text if a token stands in both: at the same place of a run of ``span`` tokens
    that their texts have in common. The windows of `data.windows` know their text, so the run is
    read there, beyond the windows, and the rule is the same for windows of every size: of a copy,
    cut anywhere, all windows that meet one of the original are found, and no others. A phrase that
    is shorter than the run is no copy, even where it fills a window.

    Of a plain list no more is known than its tokens, which count as a text of their own.

    Args:
        training, evaluation: windows of token ids by the same tokenizer.
        span: how many tokens the run has; of texts shorter than two of these, half of the shorter
            one, but at least 8, as fewer stand in many a text that is no copy. Texts of fewer than
            8 tokens share text with their equal alone.

    Returns:
        The index of an evaluation window for every training window that shares text with one.
    """
    ours, theirs = _pieces(training, span), _pieces(evaluation, span)
    shared = _shared(ours, theirs, span)
    for length in {p.length for p in [*ours, *theirs] if p.length < 2 * span}:
        short, others = ([p for p in own if p.length == length] for own in (ours, theirs))
        if length < WHOLE:
            pairs = [(short, others, length)]
        else:
            run = min(span, max(WHOLE, (length + 1) // 2))
            pairs = [(ours, others, run), (short, theirs, run)]
        for some, other, run in pairs:
            shared = _shared(some, other, run) | shared
    return shared


class _Piece(NamedTuple):
    """A part of a text, and the windows in it: number, first token, end."""

    tokens: list[int]
    windows: list[tuple[int, int, int]]
    length: int  # of the whole text
    holders: list[int]  # of every token: a window that holds it, or NOBODY

    def add(self, number: int, first: int, end: int) -> None:
        """Puts in a window, all of whose tokens are there."""
        self.windows.append((number, first, end))
        self.holders.extend([NOBODY] * (len(self.tokens) - len(self.holders)))
        self.holders[first:end] = [number] * (end - first)


def _pieces(windows: Sequence[Window], span: int) -> list[_Piece]:
    """Where the windows lie in their texts, with all runs that touch one; without a bos added."""
    pieces: list[_Piece] = []
    cuts: dict[tuple[int, int], list[tuple[int, int, CutWindow, Origin]]] = {}
    for number, window in enumerate(windows):
        if isinstance(window, CutWindow) and (origin := window.origin) is not None:
            text = (id(origin.tokens), origin.begin)
            cuts.setdefault(text, []).append((origin.position, number, window, origin))
        else:
            bare = window[window.start :] if isinstance(window, CutWindow) else window
            pieces.append(_Piece([*bare], [], len(bare), []))
            pieces[-1].add(number, 0, len(bare))
    for found in cuts.values():
        _, _, _, (tokens, begin, text_end, _) = found[0]
        length, covered = text_end - begin, -1
        for position, number, window, _ in sorted(found, key=itemgetter(0)):
            end = position + len(window) - window.start
            first, last = max(0, position - span + 1), min(length, end + span - 1)
            if first > covered:
                pieces.append(_Piece([], [], length, []))
                covered = start = first
            pieces[-1].tokens.extend(tokens[begin + covered : begin + last])
            pieces[-1].add(number, position - start, end - start)
            covered = max(covered, last)
    return pieces


def _shared(ours: Sequence[_Piece], theirs: Sequence[_Piece], run: int) -> dict[int, int]:
    """Windows in pieces that share a run of so many tokens, and one of the others' for each."""
    where = _places(theirs, run)
    known = np.fromiter(where, dtype=np.uint64, count=len(where))
    shared: dict[int, int] = {}
    for piece in ours if where else ():
        hashes = _hashes(piece.tokens, run)
        starts = np.flatnonzero(np.isin(hashes, known))
        for number, first, end in piece.windows if len(starts) else ():
            low, high = np.searchsorted(starts, (first - run + 1, end))
            for start in starts[low:high].tolist():
                mine, places = piece.tokens[start : start + run], where[int(hashes[start])]
                part = max(first - start, 0), min(end - start, run)
                if (other := _window_at(theirs, places, mine, part)) is not None:
                    shared[number] = other
                    break
    return shared


def _window_at(
    pieces: Sequence[_Piece],
    places: Sequence[tuple[int, int]],
    run: list[int],
    part: tuple[int, int],
) -> int | None:
    """A window that holds a token of this part of a run; equal hashes are compared."""
    for index, start in places:
        piece = pieces[index]
        holders = piece.holders[start + part[0] : start + part[1]]
        number = max(holders, default=NOBODY)
        if number != NOBODY and piece.tokens[start : start + len(run)] == run:  # not hashes alone
            return number
    return None


def _places(pieces: Sequence[_Piece], span: int) -> dict[int, list[tuple[int, int]]]:
    """By a run's number, the pieces and the places in them where it starts."""
    where: dict[int, list[tuple[int, int]]] = {}
    for index, piece in enumerate(pieces):
        for start, value in enumerate(_hashes(piece.tokens, span).tolist()):
            where.setdefault(value, []).append((index, start))
    return where


def check_disjoint(
    training: Sequence[Window], evaluation: Sequence[Window], *, span: int = SPAN
) -> None:
    """Raises ShortGPTError if a model would be trained on text that it is evaluated on.

    Arguments as in `overlapping`.
    """
    shared = overlapping(training, evaluation, span=span)
    if shared:
        number, other = next(iter(shared.items()))
        raise ShortGPTError(
            f"{len(shared)} of {len(training)} training windows share text with the windows to "
            f"evaluate on ({span} tokens in a row, or half of a shorter text; number {number} "
            f"with evaluation window {other}, for one): healing must not see that text; train on "
            "another, or leave those windows out"
        )


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

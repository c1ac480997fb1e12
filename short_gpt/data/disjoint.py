"""Keeping what a model is trained on apart from what it is evaluated on."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple, TypeVar

from short_gpt.data.texts import Conversation
from short_gpt.data.windows import Origin, Prefixed, Text, TokenIds, Window
from short_gpt.runtime.errors import ShortGPTError, check

SPAN = 64  # tokens; texts that share so many in a row are taken as copies of each other
SHORTEST = 8  # tokens of a run; fewer stand in many texts that are not copies
NONE = -1  # stands for no window
W = TypeVar("W", bound=Sequence[int])
T = TypeVar("T", bound=Text)


def hold_out(texts: Sequence[T], *, share: float = 0.1, seed: int = 0) -> tuple[list[T], list[T]]:
    """Texts to train on and held-out texts to evaluate on.

    Args:
        texts: of one alone, its end is held out.
        share: of all characters that is held out, about; at least one text is.
    """
    check(0 < share < 1, "share", share, "a number between 0 and 1")
    if len(texts) < 2:
        return _end_held_out(texts, share)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    most, size = share * sum(map(len, texts)), 0
    held: set[int] = set()
    for index in order[:-1]:
        if held and size + len(texts[index]) / 2 > most:
            break
        held.add(index)
        size += len(texts[index])
    training = [text for i, text in enumerate(texts) if i not in held]
    return training, [text for i, text in enumerate(texts) if i in held]


def _end_held_out(texts: Sequence[T], share: float) -> tuple[list[T], list[T]]:
    """The only text up to a space or a line break, and what follows it."""
    (text,) = texts or ("",)
    if isinstance(text, str) and not isinstance(text, Conversation):
        cut = max(text.rfind(space, 0, round(len(text) * (1 - share))) for space in " \n") + 1
        if cut:
            return [text[:cut]], [text[cut:]]  # type: ignore[list-item]
    raise ShortGPTError(
        f"{len(texts)} text cannot be split into one to train on and one to evaluate on: give "
        "several texts, or others to evaluate on (`eval_data`)"
    )


def without_overlap(
    windows: Sequence[W], others: Sequence[TokenIds], *, span: int = SPAN
) -> tuple[list[W], int]:
    """The windows that share no text with others, as in `overlapping`, and how many were removed.

    Example:
        >>> without_overlap([[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 2, 3]])
        ([[4, 5, 6]], 1)
    """
    shared = overlapping(windows, others, span=span)
    return [window for i, window in enumerate(windows) if i not in shared], len(shared)


def overlapping(
    training: Sequence[TokenIds], evaluation: Sequence[TokenIds], *, span: int = SPAN
) -> dict[int, int]:
    """Which windows to train on share text with windows to evaluate on.

    Two windows share text if both contain the same token of a run of ``span`` tokens that occurs in
    both texts. The windows of `data.windows` know their text, and so the run may extend beyond
    them: of a copy, exactly the windows that meet one of the original count. A plain list counts as
    a whole text. What was put before a text, as by a chat template, does not belong to it.

    Args:
        training: windows of token ids, and so is ``evaluation``, by the same tokenizer.
        span: how many tokens the run has; of texts shorter than two of these, half of the shorter
            one, but at least 8. Texts of fewer than 8 tokens share text with their equal alone.

    Returns:
        The index of an evaluation window for every training window that shares text with one.
    """
    ours, theirs = _pieces(training, span), _pieces(evaluation, span)
    shared = _shared(ours, theirs, span)
    for length in {piece.length for piece in [*ours, *theirs] if piece.length < 2 * span}:
        short, others = ([p for p in own if p.length == length] for own in (ours, theirs))
        if length < SHORTEST:
            pairs = [(short, others, length)]
        else:
            run = min(span, max(SHORTEST, (length + 1) // 2))
            pairs = [(ours, others, run), (short, theirs, run)]
        for some, other, run in pairs:
            shared = _shared(some, other, run) | shared
    return shared


class _Piece(NamedTuple):
    """A part of a text, and the windows in it: number, first token, end."""

    tokens: list[int]
    windows: list[tuple[int, int, int]]
    length: int  # of the complete text
    holders: list[int]  # of every token: a window that holds it, or NONE

    def add(self, number: int, first: int, end: int) -> None:
        """Adds a window, all of whose tokens are there."""
        self.windows.append((number, first, end))
        self.holders.extend([NONE] * (len(self.tokens) - len(self.holders)))
        self.holders[first:end] = [number] * (end - first)


def _pieces(windows: Sequence[TokenIds], span: int) -> list[_Piece]:
    """The parts of texts around windows, with all runs that touch one; without an added bos."""
    pieces: list[_Piece] = []
    by_text: dict[tuple[int, int], list[tuple[int, int, Window, Origin]]] = {}
    for number, window in enumerate(windows):
        if isinstance(window, Window) and (origin := window.origin) is not None:
            text = (id(origin.tokens), origin.begin)
            by_text.setdefault(text, []).append((origin.position, number, window, origin))
        else:
            bare = window[window.start :] if isinstance(window, Prefixed) else window
            pieces.append(_Piece([*bare], [], len(bare), []))
            pieces[-1].add(number, 0, len(bare))
    for of_text in by_text.values():
        tokens, begin, text_end, _ = of_text[0][3]
        length, covered = text_end - begin, -1
        for position, number, window, _ in sorted(of_text, key=itemgetter(0)):
            end = position + len(window) - window.start
            first, last = max(0, position - span + 1), min(length, end + span - 1)
            if first > covered:
                pieces.append(_Piece([], [], length, []))
                covered = start = first
            pieces[-1].tokens.extend(tokens[begin + covered : begin + last])
            pieces[-1].add(number, position - start, end - start)
            covered = max(covered, last)
    return pieces


def _runs(tokens: Sequence[int], run: int) -> Iterator[bytes]:
    """All runs of so many tokens, in order, as bytes that can be looked up."""
    data = array("i", tokens)
    width, data_bytes = data.itemsize, data.tobytes()
    ends = range(run * width, len(data_bytes) + 1, width)
    return (data_bytes[end - run * width : end] for end in ends)


def _shared(ours: Sequence[_Piece], theirs: Sequence[_Piece], run: int) -> dict[int, int]:
    """Windows in pieces that share a run of so many tokens, and one of the others' for each."""
    evaluation: dict[bytes, list[tuple[_Piece, int]]] = {}  # pieces and starts of a run
    for piece in theirs:
        for start, tokens in enumerate(_runs(piece.tokens, run)):
            evaluation.setdefault(tokens, []).append((piece, start))
    shared: dict[int, int] = {}
    for piece in ours if evaluation else ():
        runs = enumerate(_runs(piece.tokens, run))
        matches = [(start, evaluation[r]) for start, r in runs if r in evaluation]
        for number, first, end in piece.windows if matches else ():
            low = bisect_left(matches, first - run + 1, key=itemgetter(0))
            high = bisect_left(matches, end, key=itemgetter(0))
            for start, others in matches[low:high]:
                # the part of the run that is in the window
                other = _window_at(others, max(first - start, 0), min(end - start, run))
                if other is not None:
                    shared[number] = other
                    break
    return shared


def _window_at(runs: Sequence[tuple[_Piece, int]], begin: int, end: int) -> int | None:
    """A window that holds a token between these offsets in one of equal runs."""
    for piece, start in runs:
        number = max(piece.holders[start + begin : start + end], default=NONE)
        if number != NONE:
            return number
    return None


def check_disjoint(training: Sequence[TokenIds], evaluation: Sequence[TokenIds]) -> None:
    """Raises ShortGPTError if windows are `overlapping`; the arguments are as there."""
    if shared := overlapping(training, evaluation):
        number, other = next(iter(shared.items()))
        raise ShortGPTError(
            f"{len(shared)} of {len(training)} training windows share text with the windows to "
            f"evaluate on ({SPAN} tokens in a row, or half of a shorter text; number {number} "
            f"with evaluation window {other}, for one): healing must not see that text; leave "
            "those out by `short_gpt.data.without_overlap`, or train on another"
        )

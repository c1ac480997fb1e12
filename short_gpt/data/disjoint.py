"""Keeping what a model is trained on apart from what it is evaluated on."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from short_gpt.data.texts import Conversation
from short_gpt.data.windows import Prefixed, Text, TokenIds, Window
from short_gpt.runtime.errors import ShortGPTError, check

SPAN = 64  # tokens; texts that share so many in a row are taken as copies of each other
SHORTEST = 8  # tokens of a run; fewer stand in many texts that are not copies
W = TypeVar("W", bound=Sequence[int])
T = TypeVar("T", bound=Text)


def hold_out(texts: Sequence[T], *, share: float = 0.1, seed: int = 0) -> tuple[list[T], list[T]]:
    """Texts to train on and held-out texts to evaluate on.

    Args:
        texts: Texts; of a single one, its end is held out.
        share: Share of all characters to hold out, about; at least one text. Default: 0.1.
        seed: Seed of the choice of texts. Default: 0.
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


def without_overlap(windows: Sequence[W], others: Sequence[TokenIds]) -> tuple[list[W], int]:
    """The windows that share no text with others, as in `overlapping`, and how many were removed.

    Example:
        >>> without_overlap([[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 2, 3]])
        ([[4, 5, 6]], 1)
    """
    shared = overlapping(windows, others)
    return [window for i, window in enumerate(windows) if i not in shared], len(shared)


def overlapping(training: Sequence[TokenIds], evaluation: Sequence[TokenIds]) -> dict[int, int]:
    """Which windows to train on share text with windows to evaluate on.

    Two windows share text if both contain the same token of a run of `SPAN` tokens that occurs in
    both texts. The windows of `data.windows` know their text, and so the run may extend beyond
    them: of a copy, exactly the windows that meet one of the original count. A plain list counts as
    a whole text. What was put before a text, as by a chat template, does not belong to it. Of texts
    shorter than two spans, half of the shorter one is enough, but at least 8 tokens; texts of fewer
    than 8 tokens share text with their equal alone.

    Args:
        training: Windows of token ids to learn from.
        evaluation: Windows of token ids to evaluate on, by the same tokenizer.

    Returns:
        The index of an evaluation window for every training window that shares text with one.
    """
    ours, theirs = ([_Piece.of(i, w) for i, w in enumerate(own)] for own in (training, evaluation))
    shared = _shared(ours, theirs, SPAN)
    for length in {piece.length for piece in [*ours, *theirs] if piece.length < 2 * SPAN}:
        short, others = ([p for p in own if p.length == length] for own in (ours, theirs))
        if length < SHORTEST:
            pairs = [(short, others, length)]
        else:
            run = min(SPAN, max(SHORTEST, (length + 1) // 2))
            pairs = [(ours, others, run), (short, theirs, run)]
        for some, other, run in pairs:
            shared = _shared(some, other, run) | shared
    return shared


class _Piece(NamedTuple):
    """A window in the part of its text that runs which touch it can reach."""

    number: int  # of the window
    tokens: Sequence[int]  # of the part; without what was put before the text
    first: int  # of the window in the part
    end: int
    length: int  # of the complete text

    @classmethod
    def of(cls, number: int, window: TokenIds) -> _Piece:
        bare = window[window.start :] if isinstance(window, Prefixed) else window
        if not isinstance(window, Window) or window.origin is None:
            return cls(number, bare, 0, len(bare), len(bare))
        text, begin, first = window.origin
        low, end = max(0, first - SPAN + 1), first + len(bare)
        part = text[begin + low : begin + end + SPAN - 1]
        return cls(number, part, first - low, end - low, len(text) - begin)

    def runs(self, length: int) -> Iterator[tuple[bytes, range]]:
        """The part's runs of so many tokens as bytes, and which of their tokens the window has."""
        data = array("i", self.tokens)
        width, content = data.itemsize, data.tobytes()
        for start in range(len(data) - length + 1):
            held = range(max(self.first - start, 0), min(self.end - start, length))
            if held:
                yield content[start * width : (start + length) * width], held


def _shared(ours: Sequence[_Piece], theirs: Sequence[_Piece], run: int) -> dict[int, int]:
    """Windows of pieces that share a run of so many tokens, and one of the others' for each."""
    evaluation: dict[bytes, list[tuple[int, range]]] = {}  # windows that touch a run, and where
    for piece in theirs:
        for tokens, held in piece.runs(run):
            evaluation.setdefault(tokens, []).append((piece.number, held))
    shared: dict[int, int] = {}
    for piece in ours if evaluation else ():
        matches = ((held, evaluation.get(tokens, ())) for tokens, held in piece.runs(run))
        others = (
            number
            for held, windows in matches
            for number, other in windows
            if max(held.start, other.start) < min(held.stop, other.stop)
        )
        if (number := next(others, None)) is not None:
            shared[piece.number] = number
    return shared


def check_disjoint(training: Sequence[TokenIds], evaluation: Sequence[TokenIds]) -> None:
    """Raises ShortGPTError if windows are `overlapping`; the arguments are as there."""
    if shared := overlapping(training, evaluation):
        number, other = next(iter(shared.items()))
        raise ShortGPTError(
            f"{len(shared)} of {len(training)} training windows share text with the windows to "
            f"evaluate on, such as number {number} with evaluation window {other}: leave them out "
            "by `short_gpt.data.without_overlap`, or train on another text"
        )

"""Windows of tokens, cut from texts. A window is a list of token numbers from one text."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice, takewhile
from typing import NamedTuple, TypeVar

from short_gpt.runtime.errors import ShortGPTError

T = TypeVar("T")
BOS = ("first", "every")  # windows that have the text's bos in front
MOST = 2**31 - 1  # more is a mistyped number, and more than some counters hold
Span = tuple[int, int]  # start and end of a window, in tokens


class Origin(NamedTuple):
    """Where a window was cut.

    Attributes:
        tokens: of its text, and perhaps of others of the same call; the windows share them.
        begin, end: of its text in these.
        position: of the window in its text.
    """

    tokens: Sequence[int]
    begin: int
    end: int
    position: int


class Window(list[int]):
    """Token numbers, and which text they are of.

    Attributes:
        text: its number, from 0, in the order in which the texts were read.
        start: how many tokens in front were put there, not cut from the text.
        origin: its text, and where in that it was cut; None if that is not known.
    """

    __slots__ = ("origin", "start", "text")

    def __init__(
        self, tokens: Iterable[int], text: int, start: int = 0, origin: Origin | None = None
    ) -> None:
        super().__init__(tokens)
        self.text, self.start, self.origin = text, start, origin

    def __reduce__(self) -> tuple[type[Window], tuple[list[int], int, int]]:
        return Window, (list(self), self.text, self.start)


def text_of(window: Sequence[int]) -> int | None:
    """The number of a window's text; None for a plain list, whose text is not known."""
    return window.text if isinstance(window, Window) else None


def windows(
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    *,
    size: int = 1024,
    stride: int = 256,
    tail: str = "drop",
    seed: int | None = None,
    limit: int | None = None,
    bos: str = "first",
) -> Iterable[Window]:
    """Cuts texts into windows of tokens; a window never crosses from one text to the next.

    A window starts at every multiple of the stride that leaves room for `size` tokens. 1024 and
    256 are the ShortGPT authors' values (comments on huggingface.co/papers/2403.03853).

    Args:
        texts: strings.
        encode: from a text to its token numbers, with a start token if the model wants one.
        size: tokens of a window, at least 2.
        stride: tokens from one start to the next, at least 1.
        tail: "drop" leaves out what follows a text's last whole window. "keep" adds it as a
            shorter window of at least 2 tokens at the next start (one token earlier if just one
            is left): every token of a text of 2 and more is then covered if stride <= size.
        seed: None for the order of the texts. A number for all windows of all texts in random
            order, that of Python's `random.Random(seed)`, which is the same on every platform;
            the texts are then encoded at once and held at 4 bytes a token.
        limit: windows in all; with a seed they are a random sample without replacement.
        bos: "first" leaves what ``encode`` puts in front of a text (bos) where it is, in front of
            the text's first window: the ShortGPT authors' way. "every" puts it in front of every
            window, which has `size` tokens with it; windows that would just meet still do, at a
            stride shorter by it. It is read and scored as any first token, and never predicted.

    Returns:
        An iterator over `Window`, lists that know their text's number, which reads the texts as it
        goes; with a seed, a `Windows`, which has a length.

    Raises:
        ShortGPTError: an argument is out of range; or there is no window at all, which without a
            seed is known, and raised, when the texts have been read.
        TypeError: texts is one string.

    Example:
        >>> [*windows(["abcde"], lambda text: [ord(c) for c in text], size=2, stride=2)]
        [[97, 98], [99, 100]]
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string, expected an iterable of strings: pass [text]")
    _check(size, stride, limit, tail=tail, bos=bos)
    start = _start(encode, size) if bos == "every" else []
    encoded = (_behind(start, encode(text)) for text in texts)
    room = size - len(start)
    cut = _cut(encoded, room, max(1, min(stride, room)) if stride <= size else stride, tail)
    if seed is None:
        texts_cut = ((i, array("i", tokens), spans) for i, (tokens, spans) in enumerate(cut))
        each = (
            (i, span, Origin(t, 0, len(t), span[0])) for i, t, spans in texts_cut for span in spans
        )
        made = (_window(start, o.tokens[slice(*span)], i, o) for i, span, o in each)
        return islice(made, limit)
    return _shuffled(cut, start, seed, limit)


def _check(size: int, stride: int, limit: int | None, *, tail: str, bos: str) -> None:
    if tail not in ("drop", "keep"):
        raise ShortGPTError(f"tail = {tail!r}: expected 'drop' or 'keep'")
    if bos not in BOS:
        raise ShortGPTError(f"bos = {bos!r}: expected 'first' or 'every'")
    at_least(2, "size", size)
    at_least(1, "stride", stride)
    if limit is not None:
        at_least(1, "limit", limit)


def _shuffled(
    cut: Iterable[tuple[Sequence[int], list[Span]]], start: list[int], seed: int, limit: int | None
) -> Windows:
    """All windows of all texts in random order, the first so many of them."""
    flat: array[int] = array("i")
    found, ends = [], []
    for tokens, spans in cut:
        found += [(len(flat) + first, len(flat) + end) for first, end in spans]
        flat.extend(tokens)
        ends.append(len(flat))
    random.Random(seed).shuffle(found)
    return Windows(flat, found[:limit], population=len(found), ends=ends, start=start)


def starts_texts(encode: Callable[[str], Sequence[int]]) -> list[int]:
    """What an encoding puts in front of a text: bos, or nothing."""
    nothing, something = encode(""), encode("a")
    pairs = zip(nothing, something, strict=False)  # some put eos behind
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _start(encode: Callable[[str], Sequence[int]], size: int) -> list[int]:
    """What goes in front of every window, which leaves room for a token to predict."""
    start = starts_texts(encode)
    if not start:
        raise ShortGPTError("bos = 'every': this tokenizer puts no bos in front; use 'first'")
    if size < len(start) + 1:
        raise ShortGPTError(f"size = {size}: expected room for bos and a token, {len(start) + 1}")
    return start


def _behind(start: list[int], tokens: Sequence[int]) -> Sequence[int]:
    """A text's tokens without what goes in front of every window."""
    return tokens[len(start) :] if list(tokens[: len(start)]) == start else tokens


def _window(start: list[int], tokens: Iterable[int], text: int, origin: Origin) -> Window:
    return Window([*start, *tokens], text, len(start), origin)


class Windows:
    """Windows in all texts' tokens, which are held once, at 4 bytes each.

    Has a length, gives window number i by [i], and can be iterated again and again.

    Args:
        tokens: of all texts, one behind the other.
        spans: of the windows.
        population: as the attribute; None for as many as there are.
        ends: where each text ends in the tokens; none for one text.
        start: tokens in front of every window.

    Attributes:
        population: how many windows there are in all, of which these are a random sample.
    """

    def __init__(
        self,
        tokens: array[int],
        spans: Sequence[Span],
        *,
        population: int | None = None,
        ends: Sequence[int] = (),
        start: Sequence[int] = (),
    ) -> None:
        self._tokens, self._spans, self._ends, self._start = tokens, spans, ends, list(start)
        self.population = len(spans) if population is None else population

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Window:
        start, end = self._spans[index]
        text = bisect_right(self._ends, start)
        begin = self._ends[text - 1] if text else 0
        text_end = self._ends[text] if self._ends else len(self._tokens)
        origin = Origin(self._tokens, begin, text_end, start - begin)
        return _window(self._start, self._tokens[start:end], text, origin)

    def __iter__(self) -> Iterator[Window]:
        return (self[index] for index in range(len(self)))


def batches(windows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Groups windows, in their order, by `size` (at least 1); the last group may be smaller.

    Example:
        >>> [*batches([1, 2, 3], 2)]
        [[1, 2], [3]]
    """
    at_least(1, "size", size)
    rest = iter(windows)
    return iter(lambda: list(islice(rest, size)), [])


def at_least(least: int, name: str, value: int) -> None:
    """Raises ShortGPTError unless a setting is a whole number from ``least`` to `MOST`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ShortGPTError(f"{name} = {value!r}: expected a whole number of at least {least}")
    if value > MOST:
        raise ShortGPTError(f"{name} = {value}: expected at most {MOST}")


def _spans(length: int, size: int, stride: int, tail: str) -> list[Span]:
    """The windows of a text of `length` tokens; all but a kept tail are whole."""
    spans = [(start, start + size) for start in range(0, length - size + 1, stride)]
    covered, following = (spans[-1][1], spans[-1][0] + stride) if spans else (0, 0)
    if tail == "keep" and max(covered, following) < length and length >= 2:
        spans.append((min(following, length - 2), length))
    return spans


def _cut(
    encoded: Iterable[Sequence[int]], size: int, stride: int, tail: str
) -> Iterator[tuple[Sequence[int], list[Span]]]:
    """Every text's tokens with its windows; an error at the end if there was no window."""
    count, longest, empty = 0, 0, True
    for tokens in encoded:
        spans = _spans(len(tokens), size, stride, tail)
        count, longest, empty = count + 1, max(longest, len(tokens)), empty and not spans
        yield tokens, spans
    if empty:
        raise ShortGPTError(
            f"no windows: the longest of {count} texts has {longest} tokens, a window needs "
            f"{size if tail == 'drop' else 2}; use longer texts, a smaller size or tail='keep', "
            "and read an iterator of texts only once"
        )


def count_of(windows: Iterable[Sequence[int]]) -> int | None:
    """How many windows there are, where that is known before they are read."""
    return len(windows) if isinstance(windows, Sized) else None

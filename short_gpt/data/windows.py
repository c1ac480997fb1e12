"""Windows of tokens, taken from texts. A window is a list of token numbers from one text."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice, takewhile, zip_longest
from typing import Any, NamedTuple, TypeVar, overload

from short_gpt.runtime.errors import ShortGPTError, at_least, check, whole

T = TypeVar("T")
BOS = ("first", "every")  # windows that begin with the text's bos
TokenIds = Sequence[int]  # of a window
Span = tuple[int, int]  # start and end of a window, in tokens
Counted = bytes | None  # for every token 1 if a training counts it, else 0; None: it counts all
Text = str | Sequence[int]  # or its token ids, where the model itself wrote them


class Origin(NamedTuple):
    """A window's position in its text."""

    tokens: Sequence[int]  # of the text, which its windows share
    begin: int  # of the text in these, after what was put before it
    position: int  # of the window in its text


class Prefixed(list[int]):
    """Token numbers that begin with others than a text's, such as a chat template's.

    Attributes:
        start: how many tokens at the beginning were added, and are not from the text.
        counted: `Counted`; 0 is a token that is only read, such as of a user's turn.
    """

    __slots__ = ("counted", "start")

    def __init__(self, tokens: Iterable[int], start: int, counted: Counted = None) -> None:
        super().__init__(tokens)
        self.start, self.counted = start, counted


class Window(Prefixed):
    """Token numbers, and which text they are of.

    Attributes:
        text: its number, from 0, in the order in which the texts were read.
        origin: None if that is not known.
    """

    __slots__ = ("origin", "text")

    def __init__(
        self,
        tokens: Iterable[int],
        text: int,
        start: int = 0,
        origin: Origin | None = None,
        counted: Counted = None,
    ) -> None:
        super().__init__(tokens, start, counted)
        self.text, self.origin = text, origin

    def __reduce__(self) -> tuple[type[Window], tuple[object, ...]]:
        return type(self), (list(self), self.text, self.start, None, self.counted)


class Answer(Window):
    """A window whose ``counted`` tokens alone are predicted, such as a prompt with its answer."""

    __slots__ = ()


def learned(window: TokenIds) -> bytes:
    """For every token 1 if a training counts it, else 0; nothing predicts the first.

    Example:
        >>> learned([5, 6, 7]) == bytes([0, 1, 1])
        True
    """
    counted = window.counted if isinstance(window, Prefixed) else None
    return b"\0" + (b"\1" * len(window) if counted is None else counted)[1:]


def evaluated(window: TokenIds) -> bytes:
    """The same for an evaluation: of an `Answer` its counted tokens, else all after the first."""
    return learned(window if isinstance(window, Answer) else [*window])


def text_number(window: Sequence[int]) -> int | None:
    """The number of a window's text; None for a plain list, whose text is not known."""
    return window.text if isinstance(window, Window) else None


def windows(
    texts: Iterable[Text],
    encode: Callable[[str], Sequence[int]],
    *,
    size: int = 1024,
    stride: int = 256,
    tail: str = "drop",
    seed: int | None = None,
    limit: int | None = None,
    bos: str = "first",
) -> Iterable[Window]:
    """Divides texts into windows of tokens; a window never crosses from one text to the next.

    A window starts at every multiple of the stride that leaves room for `size` tokens. 1024 and
    256 are the ShortGPT authors' values (comments on huggingface.co/papers/2403.03853).

    Args:
        texts: Strings; of a text that a model wrote itself, its token numbers. No window has only
            what was put before a text (`Prefixed`).
        encode: Makes token numbers of a text, with a start token if the model wants one.
        size: Tokens in a window, at least 2. Default: 1024.
        stride: Tokens from one start to the next, at least 1. Default: 256.
        tail: What follows a text's last full window: "drop" omits it, "keep" adds it as a shorter
            window of at least 2 tokens at the next start (one token earlier if just one remains).
            Default: "drop".
        seed: Seed of the random order of all windows, `random.Random(seed)`; the texts are encoded
            at once and held at 4 bytes a token. Default: the order of the texts.
        limit: Windows in all; with a seed they are a random sample without replacement.
        bos: Windows that begin with the bos of ``encode``: "first", of each text (the ShortGPT
            authors' way), or "every"; a window has `size` tokens with it, and windows that would
            just meet still do, at a stride shorter by it. Default: "first".

    Returns:
        An iterator that reads the texts as it goes; with a seed, a `Windows`, which has a length.

    Raises:
        ShortGPTError: there is no window at all; without a seed, once the texts have been read.

    Example:
        >>> [*windows(["abcde"], lambda text: [ord(c) for c in text], size=2, stride=2)]
        [[97, 98], [99, 100]]
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string, expected an iterable of strings: pass [text]")
    check(tail in ("drop", "keep"), "tail", tail, "'drop' or 'keep'")
    check(bos in BOS, "bos", bos, "'first' or 'every'")
    at_least(2, size=size)
    at_least(1, stride=stride)
    at_least(1, optional=True, limit=limit)
    at_least(0, optional=True, seed=seed)  # Python's generator takes -1 for 1
    start = _start(encode, size) if bos == "every" else []
    room = size - len(start)
    encoded = (_without(start, tokens_of(text, encode)) for text in texts)
    stride = max(1, min(stride, room)) if stride <= size else stride
    spanned = _with_spans(encoded, room, stride, tail)
    if seed is None:
        each = enumerate(spanned)
        return islice((t.window(i, s, start) for i, (t, spans) in each for s in spans), limit)
    return _shuffled(spanned, start, whole(seed), limit)


def tokens_of(text: Text, encode: Callable[[str], Sequence[int]]) -> Sequence[int]:
    """A text's token numbers: its own, or as it is encoded."""
    return encode(text) if isinstance(text, str) else text


def mix(
    kinds: Sequence[Iterable[Text]],
    encode: Callable[[str], Sequence[int]],
    *,
    seed: int | None = None,
    limit: int | None = None,
    equal: bool = False,
    **cutting: Any,
) -> Iterable[Window]:
    """`windows` of several kinds of text: as many of each, by turns or, with a seed, shuffled.

    Without a limit all are taken; if ``equal``, of each as many as there are of the smallest.
    Texts are numbered through all kinds.
    """
    if len(kinds) == 1:
        return windows(kinds[0], encode, seed=seed, limit=limit, **cutting)
    each = None if limit is None else -(-limit // len(kinds))
    by_kind, before = list[list[Window]](), 0
    for texts in map(list, kinds):
        cuts = windows(texts, encode, seed=seed, limit=each, **cutting)
        numbered = ((w, w.text + before, w.start, w.origin, w.counted) for w in cuts)
        by_kind.append([Window(*each) for each in numbered])
        before += len(texts)
    least = min(map(len, by_kind)) if equal else None
    turns = zip_longest(*(own[:least] for own in by_kind))
    mixed = [w for turn in turns for w in turn if w is not None][:limit]
    if seed is not None:  # who takes every eighth, or the last, must not take one kind alone
        random.Random(seed).shuffle(mixed)
    return mixed


class _Encoded(NamedTuple):
    """The tokens of a text, at 4 bytes each, and what `Prefixed` says of them."""

    tokens: array[int]
    start: int
    counted: Counted

    def window(self, number: int, span: Span, opening: list[int]) -> Window:
        """The window at ``span`` of the text of this number, after the tokens of ``opening``."""
        first, end = span
        origin = Origin(self.tokens, self.start, max(first - self.start, 0))
        counted = None if self.counted is None else bytes(len(opening)) + self.counted[first:end]
        before = len(opening) + max(self.start - first, 0)
        return Window([*opening, *self.tokens[first:end]], number, before, origin, counted)


def _shuffled(
    spanned: Iterable[tuple[_Encoded, list[Span]]], start: list[int], seed: int, limit: int | None
) -> Windows:
    texts, places = list[_Encoded](), list[tuple[int, Span]]()
    for number, (text, spans) in enumerate(spanned):
        texts.append(text)
        places += [(number, span) for span in spans]
    random.Random(seed).shuffle(places)
    return Windows(texts, places[:limit], start, population=len(places))


def starts_texts(encode: Callable[[str], Sequence[int]]) -> list[int]:
    """What an encoding puts before a text: bos, or nothing."""
    return common_start(encode(""), encode("a"))  # some put eos after it


def common_start(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The tokens with which both begin."""
    pairs = zip(one, other, strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _start(encode: Callable[[str], Sequence[int]], size: int) -> list[int]:
    """What goes before every window, which leaves room for a token to predict."""
    start = starts_texts(encode)
    check(start, "bos", "every", "'first', because this tokenizer puts no bos before a text")
    check(size > len(start), "size", size, f"room for bos and a token, {len(start) + 1}")
    return start


def _without(start: list[int], tokens: Sequence[int]) -> Prefixed:
    added, counted = (tokens.start, tokens.counted) if isinstance(tokens, Prefixed) else (0, None)
    gone = len(start) if list(tokens[: len(start)]) == start else 0
    return Prefixed(tokens[gone:], max(added - gone, 0), counted and counted[gone:])


class Windows(Sequence[Window]):
    """Windows in texts' tokens, which are held once, at 4 bytes each.

    Args:
        texts: Tokens of each text.
        places: Number of a window's text, and where in it the window is.
        start: Tokens before every window.
        population: Number of windows that these are a random sample of.
    """

    def __init__(
        self,
        texts: Sequence[_Encoded],
        places: Sequence[tuple[int, Span]],
        start: list[int],
        population: int,
    ) -> None:
        self._texts, self._places, self._start = texts, places, start
        self.population = population

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Window: ...

    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...

    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, span = self._places[index]
        return self._texts[number].window(number, span, self._start)


def batches(windows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Groups windows, in their order, by `size` (at least 1); the last group may be smaller.

    Example:
        >>> [*batches([1, 2, 3], 2)]
        [[1, 2], [3]]
    """
    at_least(1, size=size)
    rest = iter(windows)
    return iter(lambda: list(islice(rest, size)), [])


def _with_spans(
    encoded: Iterable[Prefixed], size: int, stride: int, tail: str
) -> Iterator[tuple[_Encoded, list[Span]]]:
    """Every text's tokens with its windows; an error at the end if there was no window."""
    longest, empty = 0, True
    for tokens in encoded:
        # a window before the text's first token has nothing of it
        spans = [s for s in _spans(len(tokens), size, stride, tail) if s[1] > tokens.start]
        longest = max(longest, len(tokens) - tokens.start)
        empty = empty and not spans
        yield _Encoded(array("i", tokens), tokens.start, tokens.counted), spans
    if empty:
        raise ShortGPTError(
            f"no windows: the longest text has {longest} tokens, a window needs "
            f"{size if tail == 'drop' else 2}; use longer texts or a smaller `size` (an iterator "
            "of texts can be read only once)"
        )


def _spans(length: int, size: int, stride: int, tail: str) -> list[Span]:
    """The windows of a text of `length` tokens; all except a kept tail are full."""
    spans = [(start, start + size) for start in range(0, length - size + 1, stride)]
    covered, following = (spans[-1][1], spans[-1][0] + stride) if spans else (0, 0)
    if tail == "keep" and max(covered, following) < length and length >= 2:
        spans.append((min(following, length - 2), length))
    return spans


def count_of(windows: Iterable[Sequence[int]]) -> int | None:
    """How many windows there are, where that is known before they are read."""
    return len(windows) if isinstance(windows, Sized) else None

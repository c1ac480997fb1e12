"""Calibration texts, and the windows of tokens that are cut from them.

A text is one string, such as a book. A window is a list of token numbers from one text.
"""

from __future__ import annotations

import json
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Span = tuple[int, int]  # start and end of a window, in tokens
SPLITS = ("train", "validation", "test")
KINDS = ".txt, .jsonl or .parquet"


def texts(source: str | Path, *, split: str | None = None, column: str = "text") -> Iterator[str]:
    """Iterates once over the texts of a local file or folder, or of a data set at the HF hub.

    A .txt file is one text, a .jsonl file has one object a line, a .parquet file one text a row.
    The first text is read before this returns, so that most errors come from the call itself.

    Args:
        source: an existing path, else a name at the hub, "allenai/c4:en" with a configuration.
        split: of a folder, only sub-folders of this name and files whose names begin with it
            ("validation-00000.parquet"), if there are any; else all files, sorted by name,
            recursively. A single file is read whole. A data set with several splits needs it.
        column: where the text is, in .jsonl, .parquet and data sets.

    Raises:
        FileNotFoundError: source looks like a path that does not exist, or the hub lacks it.
        ConnectionError: the hub cannot be reached, or `HF_HUB_OFFLINE` is set.
        ValueError: an unknown kind of file, a bad line, a missing column or split, no text.
    """
    path = Path(os.path.expanduser(str(source)))
    if str(source) and path.exists():
        files = _files(path, split)
        return _started(chain.from_iterable(_read(file, column) for file in files), source)
    if isinstance(source, Path) or _is_like_path(str(source)):
        expected = f"a file or folder of {KINDS}, or a data set at the hub such as allenai/c4:en"
        raise FileNotFoundError(f"{str(source)!r} does not exist: expected {expected}")
    return _started(_hub_texts(str(source), split, column), source)


def pg19(split: str = "validation", *, path: str | Path | None = None) -> Iterator[str]:
    """Iterates once over the books of PG-19 (arXiv:1911.05507), ShortGPT's calibration texts.

    Streams emozilla/pg19, the Parquet copy that the ShortGPT authors' code reads.

    Args:
        split: "train" (28,602 books), "validation" (50) or "test" (100).
        path: a local copy instead: validation/*.txt as in Google's bucket,
            data/validation-*.parquet as at the hub, or any source that `texts` reads.

    Raises:
        ValueError: split is another one. All else as in `texts`.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: PG-19 has {', '.join(SPLITS)}")
    if path is not None:
        return texts(Path(str(path)), split=split)
    return _started(_hub_texts("emozilla/pg19", split, "text"), "emozilla/pg19")


def windows(
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    *,
    size: int = 1024,
    stride: int = 256,
    tail: str = "drop",
    seed: int | None = None,
    limit: int | None = None,
) -> Iterable[list[int]]:
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

    Returns:
        An iterator that reads the texts as it goes; with a seed, a `Windows`, which has a length.

    Raises:
        ValueError: an argument is out of range; or there is no window at all, which without a
            seed is known, and raised, when the texts have been read.
        TypeError: texts is one string.

    Example:
        >>> [*windows(["abcde"], lambda text: [ord(c) for c in text], size=2, stride=2)]
        [[97, 98], [99, 100]]
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string, expected an iterable of strings: pass [text]")
    if tail not in ("drop", "keep"):
        raise ValueError(f"tail = {tail!r}: expected 'drop' or 'keep'")
    _at_least(2, "size", size)
    _at_least(1, "stride", stride)
    if limit is not None:
        _at_least(1, "limit", limit)
    cut = _cut((encode(text) for text in texts), size, stride, tail)
    if seed is None:
        return islice((list(t[start:end]) for t, spans in cut for start, end in spans), limit)
    flat: array[int] = array("i")
    found = []
    for tokens, spans in cut:
        found += [(len(flat) + start, len(flat) + end) for start, end in spans]
        flat.extend(tokens)
    random.Random(seed).shuffle(found)
    return Windows(flat, found[:limit], population=len(found))


class Windows:
    """Windows in all texts' tokens, which are held once, at 4 bytes each.

    Has a length, gives window number i by [i], and can be iterated again and again.

    Attributes:
        population: how many windows there are in all, of which these are a random sample.
    """

    def __init__(
        self, tokens: array[int], spans: Sequence[Span], *, population: int | None = None
    ) -> None:
        self._tokens, self._spans = tokens, spans
        self.population = len(spans) if population is None else population

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> list[int]:
        start, end = self._spans[index]
        return self._tokens[start:end].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))


def batches(windows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Groups windows, in their order, by `size` (at least 1); the last group may be smaller."""
    _at_least(1, "size", size)
    rest = iter(windows)
    return iter(lambda: list(islice(rest, size)), [])


def _at_least(least: int, name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r}: expected a whole number of at least {least}")


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
        raise ValueError(
            f"no windows: the longest of {count} texts has {longest} tokens, a window needs "
            f"{size if tail == 'drop' else 2}; use longer texts, a smaller size or tail='keep', "
            "and read an iterator of texts only once"
        )


def _started(found: Iterator[str], source: str | Path) -> Iterator[str]:
    """The same texts, the first of them already read."""
    first = next(found, None)
    if first is None:
        raise ValueError(f"{str(source)!r} holds no text")
    return chain([first], found)


def _is_like_path(source: str) -> bool:
    name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:/\\]+)?", source)
    return not name or source.startswith(".") or source.lower().endswith(tuple(_READERS))


def _files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names = [name for name in names if name.lower().endswith(tuple(_READERS))]
    names = [name for name in names if not re.search(r"(^|/)\.", name)]  # hidden ones
    if not names:
        raise ValueError(f"{str(path)!r} has no file of a known kind: expected {KINDS}")
    if split is not None:
        of_split = re.compile(rf"(^|/){re.escape(split)}(/|[^a-z/][^/]*$)")
        names = list(filter(of_split.search, names)) or names
    return [path / name for name in names]


def _read(file: Path, column: str) -> Iterator[str]:
    if file.suffix.lower() not in _READERS:
        raise ValueError(f"{file} is of an unknown kind: expected {KINDS}")
    try:
        yield from _READERS[file.suffix.lower()](file, column)
    except ValueError as error:  # also of a byte that is not UTF-8, and of a broken Parquet file
        raise ValueError(f"{file}: {error}") from error


def _read_txt(file: Path, column: str) -> Iterator[str]:
    yield file.read_text(encoding="utf-8-sig")


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _cell(json.loads(line), column)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        for batch in opened.iter_batches(16, columns=[column] if column in names else names):
            yield from (_cell(row, column) for row in batch.to_pylist())


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _cell(row: Any, column: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named values, got {row!r:.60}")
    if column not in row:
        raise ValueError(f"no column {column!r}, only {list(row)}; pass column=")
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds {row[column]!r:.60}, expected text")
    return row[column]


def _reach(name: str) -> None:
    """Asks the hub for the data set: `load_dataset` alone takes 23 s to find it out of reach."""
    # HTTPError is that of the HTTP library in use, whose connection errors need not be OSErrors.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=5)
    except RepositoryNotFoundError as error:
        message = f"{name!r} is neither a local path nor a data set that the hub shows you"
        raise FileNotFoundError(message) from error
    except (OSError, HTTPError) as error:
        raise ConnectionError(
            f"{name!r} is no local path, and the hub cannot be reached ({error}); pass a local "
            f"copy, a folder of {KINDS}: pg19(path=FOLDER), or --data FOLDER on the command line"
        ) from error


def _hub_texts(source: str, split: str | None, column: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    _reach(name)
    try:
        found = load_dataset(name, config or None, split=split, streaming=True)
        if split is None and len(found) > 1:
            raise ValueError(f"several splits, {list(found)}; pass split=")
        yield from (_cell(row, column) for row in (found if split else found.popitem()[1]))
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{name} is a script, which datasets 4 and later do not run; use a Parquet copy "
            "(emozilla/pg19 is that of PG-19) or a local folder"
        ) from error
    except ValueError as error:
        hint = f"; a configuration is given as {name}:NAME" if "onfig" in str(error) else ""
        raise ValueError(f"{name}: {error}{hint}") from error

"""Calibration texts: local files and data sets of the hub. A text is one string, such as a book.

The name of a source may end with a split and a number of texts, the first ones: ``pg19:train``,
``novels/:test``, ``allenai/c4:en:validation[:100]``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from llama.errors import damaged
from llama.sources import BuiltinName
from llama.tokenizer import check_text
from short_gpt.data.windows import Text
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError, check, without_password
from short_gpt.runtime.progress import bar

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = (*SPLITS, "valid", "dev")  # of files
SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})[\w.-]*")  # in the name of a data set of the hub
KINDS = ".txt, .jsonl or .parquet"
COLUMNS = ("text", "messages")  # the first of these that there is, where none is named
# sources that the model writes; whether as dialogs, None for half and half
OWN = {"self": None, "self:text": False, "self:chat": True}
DEMO = "demo"  # the demo's book, where no file has that name
PG19 = ("pg19", "emozilla/pg19")  # names of PG-19: its own, and that of the data set it stands for
EXPECTED = f"a file or folder of {KINDS}, demo, or a data set at the hub such as allenai/c4:en"


class Default(str):
    """The name of a text that a setting has by default."""


class Conversation(str):
    """Messages with role and content, as JSON; a wrapper encodes them by its chat template."""

    @classmethod
    def of(cls, messages: object) -> Conversation | None:
        """One of these messages; None where they are no list of them."""
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            return None
        return cls(json.dumps([{k: turn[k] for k in ("role", "content")} for turn in messages]))

    @property
    def messages(self) -> list[dict[str, str]]:
        return list(json.loads(self))


def check_plain(text: str) -> None:
    """Raises ShortGPTError for a `Conversation`, of a model without a chat template."""
    if isinstance(text, Conversation):
        raise ShortGPTError(
            "a conversation needs a model with a chat template, of Hugging Face's format or GGUF: "
            "take an instruct model, held in memory, or give plain text"
        )


class TextsInMemory(str):
    """Texts that are in memory; as a string it is a name with a digest of them, for records.

    Attributes:
        rows: strings, or rows with columns: a list or a ``datasets.Dataset``.
    """

    rows: Iterable[object]

    def __new__(cls, rows: Iterable[object]) -> TextsInMemory:
        digest = getattr(rows, "_fingerprint", None)  # a Dataset's, of all that made it
        # a set has another order in every run, the others hold several sources
        if isinstance(rows, dict | set | frozenset) or hasattr(rows, "iterrows"):
            raise ShortGPTError(
                f"expected a list of texts or a datasets.Dataset, got a {type(rows).__name__}: "
                "pass one split or column, as a list"
            )
        if digest is None:
            rows = list(rows)
        name = f"{type(rows).__name__} {digest or json_digest(str(rows))}"
        texts = super().__new__(cls, name[:30])
        texts.rows = rows
        return texts


class TextName(NamedTuple):
    """The parts of a source's name."""

    source: str  # without the others; a name at the hub may have a configuration: allenai/c4:en
    split: str | None = None
    limit: int | None = None  # number of texts, the first ones

    @classmethod
    def of(cls, name: str) -> TextName:
        """The parts of a name; a path that exists as it is written has no others.

        Example:
            >>> TextName.of("pg19:train[:100]")
            TextName(source='pg19', split='train', limit=100)
            >>> TextName.of("allenai/c4:en")
            TextName(source='allenai/c4:en', split=None, limit=None)
        """
        if isinstance(name, TextsInMemory) or _exists(name):
            return cls(name)
        match = re.fullmatch(r"(.+)\[:([1-9]\d{0,8})\]", name)
        limit = None if match is None else int(match[2])
        rest = name if match is None else match[1]
        source, _, split = rest.rpartition(":")
        if source and not _exists(rest) and (SPLIT.fullmatch(split) or _exists(source)):
            return cls(source, split, limit)
        return cls(rest, None, limit)


def texts(
    source: str | Path | Iterable[object], *, split: str | None = None, column: str | None = None
) -> Iterator[str]:
    """Iterates once over the texts of a local file or folder, or of a data set at the HF hub.

    A .txt file is one text, a .jsonl file has one object a line, a .parquet file one text a row.
    The first text is read before this returns, so that most errors come from the call itself.

    Args:
        source: A path, else a name at the hub; "allenai/c4:en" has a configuration. "pg19" is PG-19
            even beside a folder of that name. "demo" is the demo's book: its held-out chapters, or
            with another split than "test" the others. Or texts in memory, a list of strings or a
            ``datasets.Dataset``. A name may end with a split and a number of texts, as in
            "novels/:train" and "pg19:validation[:100]".
        split: Split of a data set, where the name has none. Of a folder, only sub-folders of this
            name and files whose names begin with it, if there are any, or have it inside, as
            wiki.test.txt, where all names have one; else all files, sorted by name.
        column: Column of the text in .jsonl, .parquet and data sets. Rows that are lists of
            messages with role and content are a `Conversation`. Default: "text", else "messages".

    Raises:
        FileNotFoundError: source looks like a path that does not exist, or the hub lacks it.
        ConnectionError: the hub cannot be reached, or `HF_HUB_OFFLINE` is set.
        ShortGPTError: an unknown kind of file, a bad line, a missing column or split, no text.

    Example:
        >>> chapters = texts("novels/:train")  # doctest: +SKIP
    """
    if not isinstance(source, str | Path):
        source = TextsInMemory(source)
    if isinstance(source, TextsInMemory):
        rows = ({column or COLUMNS[0]: r} if isinstance(r, str) else r for r in source.rows)
        return _started((_cell(row, column) for row in rows), source)
    name = TextName(str(source)) if isinstance(source, Path) else TextName.of(source)
    every = _texts(name, source, name.split or split, column)
    return islice(every, name.limit)


def _texts(
    name: TextName, source: str | Path, split: str | None, column: str | None
) -> Iterator[str]:
    path = _path(name.source)
    if name.source in OWN:
        raise ShortGPTError(
            f"{source} is the model's own text, which no model is judged by (perplexity on own "
            f"samples is not quality): expected {EXPECTED}"
        )
    if name.source == PG19[0] and not isinstance(source, Path):
        return pg19(split or "validation")
    if name.source == DEMO and (isinstance(source, BuiltinName) or not path.exists()):
        from short_gpt.data.demo import bible

        return iter(bible("held_out" if split in (None, "test") else "calibration"))
    if name.source and path.exists():
        files = _files(path, split, strict=name.split is not None)
        return _started(chain.from_iterable(_read(file, column) for file in files), source)
    if isinstance(source, Path) or _is_like_path(name.source):
        raise FileNotFoundError(f"no such file or folder: {str(source)!r}; expected {EXPECTED}")
    return _started(_hub_texts(name.source, split, column), source)


def pg19(split: str = "validation", *, path: str | Path | None = None) -> Iterator[str]:
    """Iterates once over the books of PG-19 (arXiv:1911.05507), ShortGPT's calibration texts.

    Streams emozilla/pg19, the Parquet copy that the ShortGPT authors read. It raises as `texts`.

    Args:
        split: "train" (28,602 books), "validation" (50) or "test" (100).
        path: Local copy, such as validation/*.txt of Google's bucket, as `texts` reads it; a
            folder of other splits alone is refused.

    Example:
        >>> books = pg19("validation", path="pg19/")  # doctest: +SKIP
    """
    check(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}, which PG-19 has")
    if path is not None:
        check_has_split(path, split)
        return texts(Path(str(path)), split=split)
    return _started(_hub_texts(PG19[1], split, COLUMNS[0]), PG19[1])


def is_local(source: str) -> bool:
    """Whether a source is a file or folder here, and not pg19."""
    name = TextName.of(source).source
    return name != PG19[0] and not isinstance(source, TextsInMemory) and _exists(name)


def check_has_split(source: str | Path, split: str) -> None:
    """Raises ShortGPTError for a folder whose names have other splits, and not this one."""
    path = _path(source)
    names = _names(path) if path.is_dir() else []
    others = [other for other in SPLIT_NAMES if _of_split(names, other)]
    if others and not _of_split(names, split):
        raise ShortGPTError(
            f"{str(source)!r} has files of {', '.join(others)}, and none of {split}: name the file "
            "or folder to read"
        )


def _path(source: str | Path) -> Path:
    return Path(os.path.expanduser(str(source)))


def _exists(name: str) -> bool:
    with suppress(OSError, ValueError):  # such as a name that is too long for a file
        return bool(name) and _path(name).exists()
    return False


def _started(texts: Iterator[str], source: str | Path) -> Iterator[str]:
    """The same texts, after the first that is not empty was read."""
    first: list[str] = []
    for text in texts:
        first.append(text)
        if text:
            return chain(first, texts)
    raise ShortGPTError(f"{str(source)!r} holds no text")


def _is_like_path(source: str) -> bool:
    name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:/\\]+)?", source)
    return not name or source.startswith(".") or source.lower().endswith(tuple(_READERS))


def _files(path: Path, split: str | None, *, strict: bool = False) -> list[Path]:
    """A file itself, or those of a folder; ``strict`` refuses one without files of the split."""
    if path.is_file():
        if strict:
            raise ShortGPTError(f"{str(path)!r} is one file, which has no splits")
        return [path]
    names = _names(path)
    of_split = [] if split is None else _of_split(names, split)
    if strict and not of_split:
        raise ShortGPTError(f"{str(path)!r} has no files of the split {split}")
    return [path / name for name in of_split or names]


def _names(path: Path) -> list[str]:
    """All files below a folder, links to folders too, except hidden ones; sorted."""
    names, seen, top = list[str](), set[str](), path.resolve()
    for folder, folders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()  # a link led here before
            continue
        seen.add(real)
        for link in [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]:
            target = link.resolve()
            if target.is_relative_to(top) or top.is_relative_to(target):
                folders.remove(link.name)  # its files are met in their own place, or lie outside
        names += [Path(folder, name).relative_to(path).as_posix() for name in files]
    names = [name for name in names if name.lower().endswith(tuple(_READERS))]
    names = [name for name in names if not re.search(r"(^|/)\.", name)]
    if not names:
        raise ShortGPTError(f"{str(path)!r} has no file of a known kind: expected {KINDS}")
    return sorted(names)


def _of_split(names: list[str], split: str) -> list[str]:
    """The names of a split: in a folder of that name, or of a file that begins with it."""
    end = "[^a-z/][^/]*$"
    if begin := [n for n in names if re.search(rf"(^|/){re.escape(split)}(/|{end})", n)]:
        return begin
    # inside a name the word may be of a title, unless all have such a word, as wiki.test.txt
    if not all(re.search(rf"[._-]({'|'.join(SPLIT_NAMES)}){end}", name) for name in names):
        return []
    return [name for name in names if re.search(rf"[._-]{re.escape(split)}{end}", name)]


def _read(file: Path, column: str | None) -> Iterator[str]:
    if file.suffix.lower() not in _READERS:
        raise ShortGPTError(f"{file} is of an unknown kind: expected {KINDS}")
    try:
        yield from _READERS[file.suffix.lower()](file, column)
    except ValueError as error:  # also of bytes that are not UTF-8, and of a damaged Parquet file
        raise ShortGPTError(f"{file}: {error}") from error
    except OSError as error:  # of Parquet's pages, where the system says nothing
        if error.errno:
            raise
        raise damaged(file, error) from None


def _read_jsonl(file: Path, column: str | None) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield _cell(json.loads(line), column)
            except (ValueError, RecursionError) as error:
                raise ShortGPTError(f"line {number}: {error}") from None


def _read_parquet(file: Path, column: str | None) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        read = [name for name in ([column] if column else COLUMNS) if name in names][:1]
        for batch in opened.iter_batches(16, columns=read or names):
            yield from (_cell(row, column) for row in batch.to_pylist())


Reader = Callable[[Path, str | None], Iterator[str]]  # of a file and a column
_READERS: dict[str, Reader] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
_READERS[".txt"] = lambda file, _: iter([file.read_text(encoding="utf-8-sig")])


def _is_message(turn: object) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))


def _cell(row: object, column: str | None) -> str:
    """The text of a row: that of its column, or messages as a `Conversation`."""
    if not isinstance(row, dict):
        raise ShortGPTError(f"expected an object with named values, got {row!r:.60}")
    name = column or next((name for name in COLUMNS if name in row), COLUMNS[0])
    if name not in row:
        raise ShortGPTError(
            f"no column {name!r}, only {', '.join(map(str, row))}: name one by `column`"
        )
    if conversation := Conversation.of(row[name]):
        for turn in conversation.messages:
            check_text(turn["content"])
        return conversation
    if not isinstance(row[name], str):
        raise ShortGPTError(f"column {name!r} holds {row[name]!r:.60}, expected text")
    check_text(row[name])
    return row[name]


def _reach(name: str) -> None:
    """Asks the hub for the data set: `load_dataset` alone takes 23 s to find it out of reach."""
    # HTTPError is that of the HTTP library in use, whose connection errors need not be OSErrors.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=5)
    except (RepositoryNotFoundError, HFValidationError) as error:
        message = f"no such file or folder: {name!r}, and no data set that the hub shows you"
        raise FileNotFoundError(f"{message}; expected {EXPECTED}") from error
    except (OSError, HTTPError) as error:
        raise ConnectionError(
            f"no such file or folder: {name!r}, and the hub cannot be reached "
            f"({without_password(str(error))}); name a local copy, a folder of {KINDS}, or demo"
        ) from error


def _hub_texts(source: str, split: str | None, column: str | None) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    _reach(name)
    try:
        data = load_dataset(name, config or None, split=split, streaming=True)
        if split is None and len(data) > 1:
            raise ShortGPTError(f"several splits, {', '.join(data)}: name one, as in {source}:test")
        yield from (_cell(row, column) for row in (data if split else data.popitem()[1]))
    except (ValueError, RuntimeError) as error:  # such as a script, which is not run
        hint = f"; a configuration is given as {name}:NAME" if "onfig" in str(error) else ""
        raise ShortGPTError(f"{name}: {without_password(str(error))}{hint}") from error


def source_names(data: str) -> list[str]:
    """The sources that a name stands for: one, if it is that of a file, or several by commas."""
    one = isinstance(data, TextsInMemory | Default) or _exists(data)
    return [data] if one else [name.strip() for name in data.split(",")]


def check_named_once(names: Sequence[str], *, setting: str = "data") -> None:
    """Raises ShortGPTError if a text, which would count twice, is named twice in a setting."""
    seen = set[tuple[object, str | None]]()
    for name in names:
        source, split, _ = TextName.of(name)
        if source in PG19:  # two names of one data set
            source, split = PG19[0], split or "validation"
        local = source not in (*OWN, *PG19) and not isinstance(name, TextsInMemory)
        key = (_path(source).resolve() if local and _exists(source) else source, split)
        keys = {(own, None) for own in OWN} if key == ("self", None) else {key}  # self is of both
        if keys & seen:
            raise ShortGPTError(f"`{setting}` names {name} twice: name it once")
        seen |= keys


def evaluation_texts(eval_data: str | None, column: str | None = None) -> dict[str, Iterator[str]]:
    """The `texts` of each source to evaluate on; the first of each is read at once."""
    names = [] if eval_data is None else source_names(eval_data)
    check_named_once(names, setting="eval_data")
    return {name: texts(name, column=column) for name in names}


def read_kinds(data: str, column: str | None = None) -> list[Iterable[Text]]:
    """Each source's `read_texts`; its name alone (of `OWN`) where the model is to write them."""
    return [name if name in OWN else read_texts(name, column) for name in source_names(data)]


def read_texts(
    name: str, column: str | None = None, *, split: str | None = "validation"
) -> Iterator[str]:
    """The `texts` of a source, with a progress bar.

    Args:
        name: Name of a source, which may end with a split and a number of texts.
        column: Column of the text. Default: "text", else "messages".
        split: Split to read where the name has none. Default: "validation".
    """
    return _with_bar(texts(name, split=split, column=column), TextName.of(name).limit)


def _with_bar(texts: Iterable[str], total: int | None) -> Iterator[str]:
    """The same texts, with a progress bar while they are read."""
    with bar("reading", total=total, unit="text") as progress:
        for text in texts:
            yield text
            progress.update()

"""The texts and windows on which the literature measures perplexity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from short_gpt.data.texts import check_has_split, pg19, texts
from short_gpt.data.windows import windows
from short_gpt.runtime.errors import ShortGPTError

PROTOCOLS = ("wikitext-2", "c4", "ptb", "pg19")
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
C4 = "allenai/c4:en"
C4_TEXTS, C4_WINDOWS = 1100, 256


def check_copy(name: str, source: str | Path | None) -> str | Path:
    """The local copy of a text that no hub has; ShortGPTError where it is not given."""
    if source is None:
        raise ShortGPTError(f"{name} needs a local copy: pass `source`, such as {name}.test.txt")
    return source


def rows_of(name: str, source: str | Path | None = None) -> Iterator[str]:
    """The rows of a text of `PROTOCOLS` as `protocol` reads them; the first is read at once."""
    if name == "pg19":
        return pg19("test", path=source)
    split = "validation" if name == "c4" else "test"
    if source is not None:
        check_has_split(source, split)
    if name == "ptb":
        return texts(Path(check_copy(name, source)), split=split, column="sentence")
    named = C4 if name == "c4" else WIKITEXT2
    return texts(named if source is None else source, split=split)


def protocol(
    name: str,
    encode: Callable[[str], Sequence[int]],
    *,
    size: int = 2048,
    limit: int | None = None,
    source: str | Path | None = None,
    bos: str = "first",
) -> list[list[int]]:
    """Windows of token ids for `perplexity`, cut as published results cut them.

    "wikitext-2" is the test split, its rows joined with two line breaks, and "c4" the first 1100
    texts of the English validation split, joined with spaces, of which the first 256 windows
    count: each is tokenized as one text (SLEB, arXiv:2402.09025, SliceGPT and others). So is "ptb",
    the test split of the Penn Treebank joined with spaces (GPTQ's "ptb-new"). It is read from a
    local copy alone: ptb.test.txt, or rows with the column "sentence". "pg19" is the test split,
    book by book. Windows do not overlap; a shorter last one is dropped. No token is put before a
    window: ``encode`` may add one, once a text.

    Args:
        encode: from a text to its token ids, such as ``short.encode``.
        size: tokens of a window; published numbers have 2048.
        limit: at most this many windows, the first ones; None for all.
        source: a local copy or another name at the hub, as `texts` reads it, with
            the rows of the original in their order; for "ptb" and "pg19" only a path.
        bos: "every" puts one before every window, as `data.windows` does.

    Example:
        >>> windows = protocol("wikitext-2", short.encode, limit=40)  # doctest: +SKIP
        >>> short.perplexity(windows).value  # doctest: +SKIP
    """
    if name not in PROTOCOLS:
        raise ShortGPTError(f"protocol {name!r} is unknown: expected one of {', '.join(PROTOCOLS)}")
    rows = rows_of(name, source)
    tokenized: Iterable[str] = rows  # each on its own
    if name == "c4":
        tokenized = [" ".join(islice(rows, C4_TEXTS))]
        limit = C4_WINDOWS if limit is None else min(limit, C4_WINDOWS)
    elif name == "ptb":
        tokenized = [" ".join(" ".join(rows).split())]  # of a file, its lines are the rows
    elif name == "wikitext-2":
        tokenized = ["\n\n".join(rows)]
    return [*windows(tokenized, encode, size=size, stride=size, limit=limit, bos=bos)]

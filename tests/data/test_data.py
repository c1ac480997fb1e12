"""Texts from files and from the hub, and the windows cut from them."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import refuses
from hypothesis import given
from hypothesis import strategies as st

from short_gpt.data.texts import TextName, check_named_once, pg19, read_texts, source_names, texts
from short_gpt.data.windows import Window, Windows, learned, mix, windows
from short_gpt.runtime.errors import ShortGPTError

BOOKS = ["First book.\n\nIt is short.", "Second book: naïve.", "Third."]


def write_txt(folder: Path, books: list[str] = BOOKS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, book in enumerate(books):
        (folder / f"{number}.txt").write_text(book, encoding="utf-8")


def write_parquet(file: Path, books: list[str] = BOOKS) -> None:
    """A file with the columns of PG-19's Parquet copy."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "short_book_title": [f"Title {n}" for n in range(len(books))],
        "publication_date": pa.array([1850] * len(books), pa.int32()),
        "url": ["http://www.gutenberg.org/ebooks/1"] * len(books),
        "text": books,
    }
    pq.write_table(pa.table(columns), file)


def write_jsonl(file: Path, books: list[str] = BOOKS, column: str = "text") -> None:
    lines = (json.dumps({column: book, "n": n}) for n, book in enumerate(books))
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


# Local files


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    write_txt(tmp_path)
    assert [*texts(tmp_path / "1.txt")] == [BOOKS[1]]
    assert [*texts(str(tmp_path / "1.txt"), split="validation")] == [BOOKS[1]]


def test_jsonl_and_parquet_hold_a_text_a_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "a.parquet")
    assert [*texts(tmp_path / "a.jsonl")] == BOOKS
    assert [*texts(tmp_path / "a.parquet")] == BOOKS
    assert [*texts(tmp_path / "a.parquet", column="short_book_title")][2] == "Title 2"


def test_a_folder_is_read_recursively_by_name_and_passes_over_other_files(tmp_path: Path) -> None:
    write_txt(tmp_path / "b", ["in b"])
    write_txt(tmp_path / ".cache", ["hidden"])
    write_jsonl(tmp_path / "c.jsonl", ["in c"], column="content")
    (tmp_path / "a.TXT").write_text("in a", encoding="utf-8-sig")
    (tmp_path / "README.md").write_text("not a text")
    (tmp_path / "c.jsonl").write_text('{"text": "in c"}')
    assert [*texts(tmp_path)] == [*texts(tmp_path, split="test")] == ["in a", "in b", "in c"]


@pytest.mark.parametrize("layout", ["bucket", "parquet", "prefix", "nested", "within"])
def test_a_split_of_a_folder_is_read_alone(tmp_path: Path, layout: str) -> None:
    for split in ("train", "validation", "test"):
        books = [f"{split} {book}" for book in BOOKS]
        if layout == "bucket":
            write_txt(tmp_path / split, books)
        if layout == "parquet":
            write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", books)
        if layout == "prefix":
            write_jsonl(tmp_path / f"{split}.jsonl", books)
        if layout == "nested":
            write_txt(tmp_path / "data" / split, books)
        if layout == "within":
            write_jsonl(tmp_path / f"c4-{split}.00000-of-00002.jsonl", books[:1])
            write_jsonl(tmp_path / f"c4-{split}.00001-of-00002.jsonl", books[1:])
    if layout != "within":  # where all names have a split
        write_txt(tmp_path / "validations", ["of another name"])
    (tmp_path / "metadata.csv").write_text("1,title,1850")
    assert [*texts(tmp_path, split="validation")] == [f"validation {book}" for book in BOOKS]
    assert [*pg19(path=tmp_path)] == [f"validation {book}" for book in BOOKS]
    assert [*pg19("test", path=str(tmp_path))] == [f"test {book}" for book in BOOKS]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("novels/", ["train", "validation"]),
        ("novels/:train", ["train"]),
        ("novels/:validation[:5]", ["validation"]),
        ("novels[:1]", ["train"]),
        ("novels/train/0.txt[:3]", ["train"]),
        ("notes:train", ["a path that exists as it is written"]),
    ],
)
def test_a_name_may_end_with_a_split_and_a_number(tmp_path, monkeypatch, name, expected) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        write_txt(tmp_path / "novels" / split, [split])
    write_txt(tmp_path / "notes:train", ["a path that exists as it is written"])
    assert [*texts(name)] == expected
    if name in ("novels/", "novels[:1]"):
        expected = ["validation"]  # where a name says nothing
    assert [*read_texts(name)] == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pg19", ("pg19", None, None)),
        ("pg19:train[:100]", ("pg19", "train", 100)),
        ("allenai/c4:en", ("allenai/c4:en", None, None)),
        ("allenai/c4:en:validation", ("allenai/c4:en", "validation", None)),
        ("a/chats:train_sft", ("a/chats", "train_sft", None)),
        ("self:chat", ("self:chat", None, None)),
        ("demo:test[:2]", ("demo", "test", 2)),
        ("a.txt[:0]", ("a.txt[:0]", None, None)),
    ],
)
def test_the_parts_of_a_name(name, parts) -> None:
    assert TextName.of(name) == parts


def test_without_a_column_it_is_text_else_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    rows = [{"messages": turns, "text": "text"}, {"messages": turns}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "b.parquet")
    first, *others = texts(tmp_path)
    assert first == "text" and [other.messages for other in others] == [turns] * 2


def test_pg19_is_not_read_from_other_splits(tmp_path: Path) -> None:
    write_txt(tmp_path / "train")
    assert [*texts(tmp_path, split="test")] == BOOKS
    refuses(r"has files of train, and none of test: name the file", pg19, "test", path=tmp_path)
    refuses("has no files of the split test", texts, f"{tmp_path}:test")
    refuses("split = 'dev': expected one of train, validation, test", pg19, "dev")


@pytest.mark.parametrize(
    "source",
    ["./novels", "~no-one/novels", "novels.txt", "a/b/c", "", "a\\b", "--", Path("novels")],
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(source: str | Path) -> None:
    refuses(r"^no such file or folder: .*; expected a", texts, source, error=FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text", r"a\.csv is of an unknown kind: expected \.txt, \.jsonl or \.parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl: line 2: Expecting value.*column 10"),
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, r"a\.jsonl: line 1: .*recursion"),
        ("a.jsonl", b'{"text": "a\\ud83d"}', r"a\.jsonl: line 1: .*'\\ud83d' as character 1"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"content": "a", "n": 1}', "line 1: no column 'text', only content, "),
        ("a.jsonl", b'{"text": null}', r"line 1: column 'text' holds None, expected text"),
        ("a.jsonl", b'["a"]', r"line 1: expected an object with named values, got \['a'\]"),
        ("a.jsonl", b"\n", r"a\.jsonl' holds no text"),
        ("a.txt", b"caf\xe9 noir", r"a\.txt: 'utf-8' codec can't decode byte 0xe9"),
        ("a.parquet", b"text", r"a\.parquet: Parquet file size is 4 bytes"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        [*texts(tmp_path / name)]


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    columns = "short_book_title, publication_date, url, text: name one by `column`"
    refuses(f"no column 'content', only {columns}", texts, tmp_path, column="content")
    refuses("column 'publication_date' holds 1850", texts, tmp_path, column="publication_date")


# The hub


class Hub:
    """Stands in for the hub: what was asked of it, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.splits = {"train": [{"text": "a", "n": 1}], "test": [{"text": "b", "n": 2}]}
        self.error: Exception | None = None

    def dataset_info(self, name: str, *, timeout: float) -> None:
        assert timeout < 10

    def load_dataset(self, name: str, config: str | None, *, split: str | None, streaming: bool):
        self.asked.append((name, config, split, streaming))
        if self.error:
            raise self.error
        return self.splits[split] if split else self.splits


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    return hub


def test_a_data_set_is_streamed(hub: Hub) -> None:
    assert [*texts("allenai/c4:en", split="test")] == ["b"]
    assert hub.asked == [("allenai/c4", "en", "test", True)]


def test_pg19_is_the_parquet_copy(hub: Hub) -> None:
    hub.splits["validation"] = [{"text": book} for book in BOOKS]
    assert [*pg19()] == BOOKS
    assert hub.asked == [("emozilla/pg19", None, "validation", True)]


def test_the_only_split_need_not_be_named(hub: Hub) -> None:
    refuses("several splits, train, test: name one, as in", texts, "allenai/c4")
    del hub.splits["train"]
    assert [*texts("allenai/c4")] == ["b"]


# Windows


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def numbered(lengths: list[int]) -> list[str]:
    """Texts of these lengths, no character twice."""
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return [
        "".join(chr(33 + c) for c in range(end - length, end))
        for length, end in zip(lengths, ends, strict=True)
    ]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6)
SIZES = st.integers(2, 12)
STRIDES = st.integers(1, 15)


def test_windows_of_a_known_text() -> None:
    def cut(text: str, **arguments: object) -> list[str]:
        found = windows([text], letters, size=4, **arguments)
        return ["".join(map(chr, window)) for window in found]

    assert cut("abcdefg", stride=2) == ["abcd", "cdef"]
    assert cut("abcdefgh", stride=2) == ["abcd", "cdef", "efgh"]  # the last ends with the text
    assert cut("abcdefg", stride=2, tail="keep") == ["abcd", "cdef", "efg"]
    assert cut("abcdefgh", stride=2, tail="keep") == ["abcd", "cdef", "efgh"]
    assert cut("abcde", stride=4, tail="keep") == ["abcd", "de"]
    assert cut("abc", stride=2, tail="keep") == ["abc"]
    assert cut("abcdefgh", stride=6, tail="keep") == ["abcd", "gh"]
    assert cut("abcdef", stride=6, tail="keep") == ["abcd"]


@given(LENGTHS.filter(lambda lengths: max(lengths) >= 12), SIZES, STRIDES)
def test_whole_windows_start_at_multiples_of_the_stride(
    lengths: list[int], size: int, stride: int
) -> None:
    books = numbered(lengths)
    expected = [
        letters(book[start : start + size])
        for book in books
        for start in range(0, len(book), stride)
        if start + size <= len(book)
    ]
    assert [*windows(books, letters, size=size, stride=stride)] == expected


@given(LENGTHS.filter(lambda lengths: max(lengths) >= 2), SIZES, STRIDES)
def test_a_kept_tail_covers_every_token(lengths: list[int], size: int, stride: int) -> None:
    stride = min(stride, size)
    books = numbered(lengths)
    found = [*windows(books, letters, size=size, stride=stride, tail="keep")]
    whole = sum(len(window) == size for window in found)
    assert {token for window in found for token in window} == {
        token for book in books if len(book) >= 2 for token in letters(book)
    }
    assert all(2 <= len(window) <= size for window in found)
    assert len(found) - whole <= len(books)
    assert all("".join(map(chr, window)) in "\n".join(books) for window in found)


LONG = LENGTHS.filter(lambda lengths: max(lengths) >= 12)


@given(LONG, SIZES, STRIDES, st.integers(0, 2**31 - 1), st.data())
def test_a_seed_permutes_and_a_limit_takes_the_first(
    lengths: list[int], size: int, stride: int, seed: int, data: st.DataObject
) -> None:
    tail = data.draw(st.sampled_from(["drop", "keep"]))
    books = numbered(lengths)
    plain = [*windows(books, letters, size=size, stride=stride, tail=tail)]
    mixed = windows(books, letters, size=size, stride=stride, tail=tail, seed=seed)
    assert isinstance(mixed, Windows)
    assert len(mixed) == len(plain)
    assert Counter(map(tuple, mixed)) == Counter(map(tuple, plain))
    assert [*mixed] == [*mixed] == [mixed[n] for n in range(len(mixed))]
    limit = data.draw(st.integers(1, len(plain)))
    for full, one_seed in ((plain, None), ([*mixed], seed)):
        part = windows(
            books, letters, size=size, stride=stride, tail=tail, seed=one_seed, limit=limit
        )
        assert [*part] == full[:limit]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("bos", ["first", "every"])
def test_which_tokens_count_goes_with_them_through_cutting_and_mixing(seed, bos) -> None:
    """Tokens of a dialog count where they are even; of other texts all count."""
    dialogs = [Window([1, *range(10 * i, 10 * i + 9)], i, counted=b"\0\1" * 5) for i in (2, 3)]
    kinds, encode = [dialogs, ["abcdefgh"]], lambda text: [1, *map(ord, text)]
    cut = [*mix(kinds, encode, size=4, stride=4, seed=seed, bos=bos)]
    cut += windows(dialogs, encode, size=4, stride=4, seed=seed, bos=bos)
    assert len([w for w in cut if max(w) < 40]) == 2 * (4 if bos == "first" else 6)
    for window in cut:
        if max(window) >= 40:
            assert window.counted is None
        else:
            assert [*window.counted] == [int(t % 2 == 0) for t in window]
        assert pickle.loads(pickle.dumps(window)).counted == window.counted
        assert [*learned(window)] == [0, *(window.counted or [1] * 4)[1:]]


def test_the_seeded_order_is_this_one_everywhere() -> None:
    first = [w[0] - 33 for w in windows(numbered([12]), letters, size=2, stride=1, seed=0)]
    assert first == [8, 9, 1, 2, 5, 3, 7, 4, 0, 10, 6]


def test_texts_are_read_as_windows_are_taken() -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(len(read))
            yield "abcdefgh"

    assert len([*islice(windows(endless(), letters, size=4, stride=2), 4)]) == 4
    assert len([*windows(endless(), letters, size=4, stride=2, limit=5)]) == 5
    assert len(read) == 4


@pytest.mark.parametrize("seed", [None, 3])
def test_no_window_says_how_long_the_texts_are(seed: int | None) -> None:
    message = "longest text has 5 tokens, a window needs 8; use longer texts or a smaller"
    with pytest.raises(ValueError, match=message):
        [*windows(["abc", "abcde"], letters, size=8, seed=seed)]
    with pytest.raises(ValueError, match=": the longest text has 1 tokens, a window needs 2"):
        [*windows(["a"], letters, tail="keep", seed=seed)]
    with pytest.raises(ValueError, match="longest text has 0 tokens"):
        [*windows([], letters, seed=seed)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "size = 1: expected a whole number of at least 2"),
        ({"size": 2.5}, r"size = 2\.5: expected a whole number"),
        ({"stride": 0}, "stride = 0: expected a whole number of at least 1"),
        ({"limit": 0}, "limit = 0: expected a whole number of at least 1"),
        ({"limit": True}, "limit = True: expected a whole number"),
        ({"tail": "pad"}, "tail = 'pad': expected 'drop' or 'keep'"),
    ],
)
def test_wrong_arguments_fail_in_the_call(arguments: dict, message: str) -> None:
    refuses(message, windows, ["abc"], letters, **arguments)


def test_several_texts_are_not_read_as_their_names() -> None:
    refuses("got a dict: pass one split or column", texts, {"train": ["a"], "test": ["b"]})

    class Table(list):
        def iterrows(self) -> None: ...

    refuses("got a Table: pass one split or column", texts, Table(["text"]))


def test_names_of_many_files_and_of_a_home_with_a_comma(tmp_path: Path, monkeypatch) -> None:
    names = [f"{'n' * 20}{i}.txt" for i in range(40)]
    assert source_names(",".join(names)) == names
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b.txt").write_text("text")
    assert source_names("~/a,b.txt") == ["~/a,b.txt"]


def test_folders_that_links_lead_to_are_read_once(tmp_path):
    main, other = tmp_path / "main", tmp_path / "other"
    for folder, name in ((main / "own", "a"), (other / "deep", "b")):
        folder.mkdir(parents=True)
        (folder / f"{name}.txt").write_text(name)
    (main / "first").symlink_to(other)
    (main / "second").symlink_to(other)
    (main / "inside").symlink_to(main / "own")
    (main / "own/round").symlink_to(main)
    (other / "back").symlink_to(tmp_path)
    (tmp_path / "private.txt").write_text("no text of that folder")
    assert sorted(texts(main)) == ["a", "b"]


def test_a_split_that_a_link_leads_to_has_its_own_name(tmp_path):
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(split)
    (tmp_path / "current").symlink_to(tmp_path / "train")
    assert [*texts(tmp_path, split="train")] == ["train"]


def test_a_text_counts_once_by_any_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("self").mkdir()
    # of these no two are one text: "self" is what the model writes, "./self" a folder
    check_named_once(["self", "./self", "a.txt", "a" * 5000])
    for again in ("a.txt", "./a.txt", str(tmp_path / "a.txt"), "a.txt[:3]"):
        refuses("twice: name it once", check_named_once, ["a.txt", again])
    refuses("twice: name it once", check_named_once, ["pg19", "emozilla/pg19"])


def test_damaged_pages_of_parquet_are_named(tmp_path):
    pq.write_table(pa.table({"text": ["some words " * 500]}), path := tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ShortGPTError, match="a.parquet"):
        [*texts(path)]


@pytest.mark.parametrize("contents", [[""], ["", ""]])
def test_a_source_of_empty_texts_is_refused_at_once(tmp_path, contents):
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_text(content)
    refuses("holds no text", texts, tmp_path)
    (tmp_path / "z.txt").write_text("some")
    assert [*texts(tmp_path)] == [*contents, "some"]

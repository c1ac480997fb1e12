"""Perplexity protocols on local copies: which texts count, how they are joined and cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from short_gpt.data.texts import pg19, texts
from short_gpt.evaluation.perplexity import protocol

# bos once a text, then the characters
BOS = -1


def encode(text: str) -> list[int]:
    return [BOS, *map(ord, text)]


def copy(folder: Path, split: str, rows: list[str]) -> Path:
    folder.mkdir()
    for name, own in ((split, rows), ("train", ["not these"])):
        lines = (json.dumps({"text": text}) for text in own)
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_wikitext_is_one_text_of_joined_rows(tmp_path):
    source = copy(tmp_path / "wiki", "test", ["", " = A = \n", "word"])
    whole = encode("\n\n = A = \n\n\nword")
    found = protocol("wikitext-2", encode, size=5, source=source)
    assert found == [whole[0:5], whole[5:10], whole[10:15]]  # the rest of 18 is dropped
    assert protocol("wikitext-2", encode, size=5, limit=2, source=source) == found[:2]


def test_c4_is_256_windows_of_the_first_1100_texts(tmp_path):
    rows = [f"{n:04}" for n in range(1200)]
    source = copy(tmp_path / "c4", "validation", rows)
    whole = encode(" ".join(rows[:1100]))
    found = protocol("c4", encode, size=20, source=source)
    assert len(found) == 256
    assert [token for window in found for token in window] == whole[: 256 * 20]
    assert len(protocol("c4", encode, size=50, source=source)) == len(whole) // 50
    assert protocol("c4", encode, size=20, limit=3, source=source) == found[:3]
    assert len(protocol("c4", encode, size=20, limit=300, source=source)) == 256


def test_pg19_windows_do_not_cross_books(tmp_path):
    source = copy(tmp_path / "pg19", "test", ["abcdefg", "hi", "jklm"])
    found = protocol("pg19", encode, size=4, source=source)
    assert found == [encode("abc"), [*map(ord, "defg")], encode("jkl")]


def test_ptb_is_one_line_of_a_local_copy(tmp_path):
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n mr. <unk> N \n")
    whole = encode("no it was n't mr. <unk> N")
    found = protocol("ptb", encode, size=6, source=tmp_path / "ptb.test.txt")
    assert [token for window in found for token in window] == whole[: len(whole) // 6 * 6]
    rows = [{"sentence": "no it was n't"}, {"sentence": "mr. <unk> N"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert protocol("ptb", encode, size=6, source=str(tmp_path / "test.jsonl")) == found
    with pytest.raises(ValueError, match="ptb needs a local copy: pass `source`"):
        protocol("ptb", encode)


@pytest.mark.parametrize(
    ("name", "prefix"), [("ptb", "ptb."), ("wikitext-2", "wiki_"), ("c4", "c4-")]
)
def test_of_files_named_by_split_only_the_split_is_read(tmp_path, name, prefix):
    split = "validation" if name == "c4" else "test"
    for other in ("train", "valid", split):
        (tmp_path / f"{prefix}{other}.txt").write_text(f"of {other}")
    found = protocol(name, encode, size=4, source=tmp_path)
    assert [token for window in found for token in window] == encode(f"of {split}")[
        : 4 * len(found)
    ]
    (tmp_path / f"{prefix}{split}.txt").unlink()
    expected = f"has files of train, valid, and none of {split}: name the file or folder to read"
    with pytest.raises(ValueError, match=expected):
        protocol(name, encode, size=4, source=tmp_path)


def test_unknown_names_and_short_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="protocol 'x' is unknown: .* wikitext-2, c4, ptb, pg19"):
        protocol("x", encode)
    source = copy(tmp_path / "wiki", "test", ["short"])
    with pytest.raises(ValueError, match="no windows: the longest text has 6 tokens"):
        protocol("wikitext-2", encode, source=source)


@pytest.mark.parametrize("name", ["wikitext-2", "c4", "pg19"])
def test_without_a_network_the_error_says_what_to_do(name):
    with pytest.raises(ConnectionError, match="the hub cannot be reached .* name a local copy"):
        protocol(name, encode)


def test_a_word_of_a_title_is_no_split(tmp_path):
    for name in ("emma", "the-last-test", "the-great-train-robbery"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert len([*texts(tmp_path, split="test")]) == len([*pg19("test", path=tmp_path)]) == 3

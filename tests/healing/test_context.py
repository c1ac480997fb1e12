"""Texts to heal by: windows to learn from, and others that share no text with them."""

from __future__ import annotations

import json
import random

import pytest

from short_gpt import ShortGPTError
from short_gpt.data import overlapping
from short_gpt.healing import healing_windows


def characters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def written(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def pieces(letters: str, count: int) -> list[str]:
    """Texts of 80 letters of two kinds, in random order, that share no long run of them."""
    return ["".join(random.Random(n).choices(letters, k=80)) for n in range(count)]


@pytest.fixture
def kinds(tmp_path):
    """A large source and a small one, told apart by their letters."""
    large = written(tmp_path / "large.jsonl", pieces("ab", 40))
    return large, written(tmp_path / "small.jsonl", pieces("yz", 10))


def share(windows) -> float:
    return sum(chr(w[0]) in "yz" for w in windows) / len(windows)


def test_of_a_mix_as_many_windows_are_read_of_every_kind(kinds):
    found = healing_windows(",".join(kinds), characters, 40, limit=8, eval_windows=2)
    assert len(found.training) == 8 and share(found.training) == 0.5
    kinds_read = [chr(w[0]) in "yz" for w in found.training]
    assert kinds_read not in ([False, True] * 4, [False] * 4 + [True] * 4)  # in random order
    assert len(found.evaluation) == 2 and share(found.evaluation) == 0.5


def test_texts_are_numbered_through_all_kinds(kinds):
    """Text 0 of one kind and text 0 of another are two samples."""
    found = healing_windows(",".join(kinds), characters, 40)
    for read in (found.training, found.evaluation):
        large, small = ({w.text for w in read if chr(w[0]) in kind} for kind in ("ab", "yz"))
        assert large and small and not large & small


def test_without_a_limit_all_of_a_mix_is_read(kinds):
    found = healing_windows(",".join(kinds), characters, 40)
    every = len(found.training) + len(found.evaluation)
    assert every == 100 and 0.15 < share(found.training) < 0.25


def test_every_source_of_a_mix_must_exist(kinds):
    with pytest.raises(FileNotFoundError, match="no such file or folder: 'no.txt'"):
        healing_windows(f"{kinds[0]},no.txt", characters, 40)
    with pytest.raises(FileNotFoundError, match="no such file or folder: ''"):
        healing_windows(f"{kinds[0]},", characters, 40)


@pytest.mark.parametrize(
    ("size", "limit"), [(2, None), (6, None), (16, 16), (24, 16), (40, 16), (64, 16), (100, 8)]
)
def test_a_copy_is_no_text_to_evaluate_on_at_any_size(tmp_path, size, limit):
    text = "".join(random.Random(0).choices("etaoinshr ", k=800))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text[2:])
    texts = {"data": str(tmp_path / "book.txt"), "eval_data": str(tmp_path / "copy.txt")}
    many = {"limit": limit, "eval_windows": limit or 400}
    try:
        left = healing_windows(encode=characters, size=size, **texts, **many).training
    except ShortGPTError as error:
        assert "windows to learn from share text with held-out ones" in str(error)
    else:  # the copy lacks the first two characters; of some windows none to evaluate on is a copy
        assert limit or all(w.origin.position + size <= 2 for w in left)


def test_one_window_cannot_both_teach_and_choose_the_step(tmp_path):
    texts = written(tmp_path / "few.jsonl", pieces("ab", 2))
    with pytest.raises(ShortGPTError, match="expected at least 2 windows, one to learn from and"):
        healing_windows(texts, characters, 40, limit=1, validate=True)
    assert len(healing_windows(texts, characters, 40, limit=1).training) == 1


@pytest.mark.parametrize(("windows", "chosen"), [(9, 1), (59, 5), (159, 15), (160, 16), (200, 16)])
def test_a_tenth_of_the_windows_and_at_most_16_choose_the_step(tmp_path, windows, chosen):
    texts = written(tmp_path / "texts.jsonl", pieces("ab", 100))
    judge = written(tmp_path / "judge.jsonl", pieces("yz", 1))
    found = healing_windows(texts, characters, 40, eval_data=judge, limit=windows, validate=True)
    assert (len(found.training), len(found.validation)) == (windows - chosen, chosen)


def test_windows_that_choose_the_step_share_no_text_with_those_to_learn_from(tmp_path):
    texts = written(tmp_path / "twice.jsonl", pieces("ab", 20) * 2)
    judge = written(tmp_path / "judge.jsonl", pieces("yz", 1))
    found = healing_windows(texts, characters, 80, eval_data=judge, validate=True)
    assert len(found.validation) == 4 and len(found.training) < 36
    assert not overlapping(found.training, found.validation)
    gone = 36 - len(found.training)
    assert found.left_out == f"left out {gone} of 40 windows that share text with held-out ones"

"""Directories whose writer is killed: the earlier one or the new one, whole, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import killed_at

from llama import files
from llama.files import check_new, new_directory, read_json, write_json


def write(out: Path, number: int) -> None:
    """A directory whose three files say the same number."""
    with new_directory(out, marker="mark.json", overwrite=True) as partial:
        write_json(partial / "mark.json", {"number": number})
        (partial / "below").mkdir()
        for name in ("a", "below/b"):
            (partial / name).write_text(str(number))


def number_in(out: Path) -> int:
    """The number that all files of a whole directory say."""
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    mark = read_json(out / "mark.json")
    assert names == sorted(mark["files"]) == ["a", "below/b", "mark.json"]
    numbers = {mark["number"], int((out / "a").read_text()), int((out / "below/b").read_text())}
    assert len(numbers) == 1, numbers
    return numbers.pop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_writer_killed_at_any_call_leaves_the_earlier_directory_or_the_new(tmp_path):
    """The next writer leaves nothing else."""
    out, found, set_aside, call = tmp_path / "below/out", [], 0, 1
    out.parent.mkdir()
    write(out, 1)
    while killed_at(call, lambda: write(out, 2)) is None:
        set_aside += not out.is_dir()
        check_new(out, marker="mark.json", overwrite=True)
        found.append(number_in(out))
        write(out, 1)
        assert number_in(out) == 1 and [*out.parent.iterdir()] == [out]
        call += 1
    # the attack hit both sides of the swap, and between its two renames
    assert min(found.count(1), found.count(2)) > 3 and len(found) >= 20
    assert set_aside == 1


def test_a_living_writers_folder_stays(tmp_path):
    out, other = tmp_path / "out", tmp_path / ".out.writing-mine"
    other.mkdir()  # not the name of a writer's folder
    with new_directory(out, marker="mark.json", overwrite=True) as first:
        write_json(first / "mark.json", {"by": 1})
        with new_directory(out, marker="mark.json", overwrite=True) as second:
            write_json(second / "mark.json", {"by": 2})
        assert read_json(first / "mark.json") == {"by": 1}
        assert read_json(out / "mark.json")["by"] == 2
    assert read_json(out / "mark.json")["by"] == 1
    assert sorted(tmp_path.iterdir()) == [other, out]


def test_the_folder_of_a_longer_name_is_another_targets(tmp_path):
    with new_directory(tmp_path / "a.b") as partial:
        (partial / "file").write_text("whole")
        check_new(tmp_path / "a")
    left = tmp_path / ".a.b.writing-01234567"
    left.mkdir()
    check_new(tmp_path / "a")
    assert left.exists()
    files.tidy(tmp_path / "a.b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b"]


def test_a_folder_that_another_writer_locked_first_is_made_again(tmp_path, monkeypatch):
    plain, tried = files.lock_file, []

    def locked(path):
        tried.append(path.parent)
        if len(tried) == 1:
            raise BlockingIOError(str(path))
        return plain(path)

    monkeypatch.setattr(files, "lock_file", locked)
    with new_directory(tmp_path / "out") as partial:
        assert partial.parent == tried[1] != tried[0]
        (partial / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"

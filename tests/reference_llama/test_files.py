"""Files and directories that appear whole or not at all, and never replace somebody's files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import refuses

from llama.files import check_new, contents, new_directory, new_file, write_json


def write(out: Path, text: str = "first", *, overwrite: bool = False) -> None:
    """A directory with a file and, below, a directory of its own with its marker."""
    with new_directory(out, marker="mark.json", overwrite=overwrite) as partial:
        write_json(partial / "mark.json", {"layers": [1]})
        (partial / "file").write_text(text)
        with new_directory(partial / "below", marker="inner.json") as below:
            write_json(below / "inner.json", {})


def test_a_marker_lists_what_its_writer_wrote(tmp_path):
    write(out := tmp_path / "out")
    files = ["below/inner.json", "file", "mark.json"]
    assert json.loads((out / "mark.json").read_text()) == {"layers": [1], "files": files}
    assert json.loads((out / "below/inner.json").read_text()) == {"files": ["inner.json"]}
    write(out, "second", overwrite=True)
    assert (out / "file").read_text() == "second" and contents(out) == files


SOMEBODYS = {
    "a file": (lambda out: (out / "mine.txt").write_text(""), "holds mine.txt, which its mark"),
    "a hidden one": (lambda out: (out / ".mine").write_text(""), "holds .mine, which"),
    "one below": (lambda out: (out / "below/mine").write_text(""), "holds below/mine, which"),
    "a folder": (lambda out: (out / "below/empty").mkdir(), "holds below/empty, which"),
    "a link": (lambda out: (out / "link").symlink_to(out.parent), "holds link, which"),
    # as a writer of an earlier version left it
    "no list": (lambda out: write_json(out / "mark.json", {}), "holds below/inner.json, which"),
    "no marker": (lambda out: (out / "mark.json").unlink(), "holds no mark.json"),
}


@pytest.mark.parametrize("name", SOMEBODYS)
def test_a_directory_with_anything_that_is_not_listed_stays(tmp_path, name):
    change, message = SOMEBODYS[name]
    write(out := tmp_path / "out")
    change(out)
    before = contents(out)
    with pytest.raises(FileExistsError, match=f"out exists and {message}"):
        write(out, "second", overwrite=True)
    assert contents(out) == before and (out / "file").read_text() == "first"


def test_nothing_is_replaced_unasked_nor_the_source(tmp_path):
    write(out := tmp_path / "out")
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    refuses("out exists; choose another name or pass", write, out, error=FileExistsError)
    for source in (out, out / "below"):
        for path in (out, tmp_path / "link"):
            with pytest.raises(FileExistsError, match="holds the source"):
                check_new(path, marker="mark.json", overwrite=True, source=source)


def test_what_was_not_finished_leaves_nothing(tmp_path):
    missing = pytest.raises(FileNotFoundError, match=r"has no mark\.json")
    with missing, new_directory(tmp_path / "out", marker="mark.json") as partial:
        (partial / "file").write_text("whole")
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_a_link_is_followed_and_a_failed_swap_leaves_the_old(tmp_path, monkeypatch):
    write(real := tmp_path / "real")
    (tmp_path / "link").symlink_to(real, target_is_directory=True)
    write(tmp_path / "link", "second", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (real / "file").read_text() == "second"
    plain = Path.rename

    def rename(self, target):
        if self.name == "new" and target == real:
            raise OSError("in use")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    refuses("in use", write, real, "third", overwrite=True, error=OSError)
    assert (real / "file").read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_somebody_else_wrote_meanwhile_is_not_replaced(tmp_path, overwrite):
    with pytest.raises(FileExistsError, match="out exists"), new_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert (tmp_path / "out" / "thesis.tex").is_file()
    file = tmp_path / "file"
    written = new_file(file, overwrite=overwrite, replaces=lambda _: False)
    with pytest.raises(FileExistsError, match="file exists"), written as partial:
        partial.write_text("whole")
        file.write_text("years of work")
    assert file.read_text() == "years of work" and not [*tmp_path.glob(".*")]


def test_a_file_may_be_written_through_a_link_that_leads_nowhere_yet(tmp_path):
    (tmp_path / "disk").mkdir()
    (path := tmp_path / "a.gguf").symlink_to(tmp_path / "disk/another")
    with new_file(path, overwrite=False, replaces=lambda _: False) as partial:
        partial.write_text(partial.name)  # programs look at what a name ends with
    assert (tmp_path / "disk/another").read_text() == "a.gguf" and path.is_symlink()


def test_json_keeps_texts_and_digits(tmp_path):
    content = {
        "text": "{{ [a,     b] }} [my   folder]",
        "numbers": [1, 0.1, 1e-300],
        "nested": [[1, 2], {"a": []}],
        "none": [None, True, math.inf],
        "empty": {},
    }
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {**content, "none": [None, True, None]}
    assert '"numbers": [1, 0.1, 1e-300]' in text

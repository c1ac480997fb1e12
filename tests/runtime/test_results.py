"""Single files that a run writes: whose place they take, and what is written to as it is."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from llama.files import is_stream, write_json
from short_gpt.runtime import StateFile, read_record, write_record
from short_gpt.runtime.state import is_record


def reader(fifo: Path) -> tuple[threading.Thread, list[str]]:
    """A thread that reads a pipe to its end."""
    os.mkfifo(fifo)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(fifo.read_text()), daemon=True)
    thread.start()
    return thread, found


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path, overwrite):
    thread, found = reader(tmp_path / "pipe")
    write_record(tmp_path / "pipe", {"n": 9}, overwrite=overwrite)
    thread.join(10)
    assert json.loads(found[0])["n"] == 9
    assert (tmp_path / "pipe").is_fifo() and is_stream(tmp_path / "pipe")
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_an_open_file_is_written_to_under_the_systems_name_for_it(tmp_path):
    with (tmp_path / "log").open("w") as log:
        print("before", file=log, flush=True)
        write_record(f"/proc/self/fd/{log.fileno()}", {"n": 9})
    first, rest = (tmp_path / "log").read_text().split("\n", 1)
    assert first == "before" and json.loads(rest)["n"] == 9


@pytest.mark.parametrize(
    "content", ['{"dim": 4096}', "{", "years of work", '{"versions": {}, "removed_layers": []}']
)
def test_only_results_are_replaced(tmp_path, content):
    path = tmp_path / "params.json"
    path.write_text(content)
    with pytest.raises(FileExistsError, match="exists; choose another name or pass `overwrite`"):
        write_record(path, {"n": 9})
    with pytest.raises(FileExistsError, match="is not what this would write there"):
        write_record(path, {"n": 9}, overwrite=True)
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_results_are_replaced_and_empty_files(tmp_path):
    path = tmp_path / "ranking.json"
    for number, content in enumerate((None, {}, {"machine": {}, "versions": {}})):
        if content is None:
            path.touch()
        elif content:
            write_json(path, content)
            assert is_record(path)
        write_record(path, {"n": number}, overwrite=True)
        assert read_record(path)["n"] == number


def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "real.json")
    for n in (1, 2):
        write_record(tmp_path / "link", {"n": n}, overwrite=True)
        assert read_record(tmp_path / "folder" / "real.json")["n"] == n
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.rglob("*"))) == 3


def test_sockets_and_folders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="is a directory"):
        write_record(tmp_path, {}, overwrite=True)
    (tmp_path / "odd").touch()
    monkeypatch.setattr(Path, "is_file", lambda self: False)  # as of a socket or a disk
    with pytest.raises(FileExistsError, match="exists and is no file"):
        write_record(tmp_path / "odd", {}, overwrite=True)


def test_a_cleared_state_takes_along_what_a_killed_save_left(tmp_path):
    state = StateFile(tmp_path / "state", {"seed": 0})
    state.save({})
    left = tmp_path / ".state.writing-01234567"
    left.mkdir()
    (left / "new").write_text('{"run": ')
    state.clear()
    assert not list(tmp_path.iterdir())

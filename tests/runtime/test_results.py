"""Single files that a run writes, and whose place they take."""

from __future__ import annotations

import os

import pytest

from llama.files import write_json
from short_gpt.runtime.state import StateFile, is_record, read_record, write_record


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


def test_pipes_and_folders_are_refused(tmp_path):
    with pytest.raises(FileExistsError, match="is a directory"):
        write_record(tmp_path, {}, overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="exists and is no file"):
        write_record(tmp_path / "pipe", {}, overwrite=True)


def test_a_cleared_state_takes_along_what_a_killed_save_left(tmp_path):
    state = StateFile(tmp_path / "state", {"seed": 0})
    state.save({})
    left = tmp_path / ".state.writing-01234567"
    left.mkdir()
    (left / "new").write_text('{"run": ')
    state.clear()
    assert not list(tmp_path.iterdir())

"""Directories whose writer is killed: the earlier one or the new one, whole, and nothing else."""

from __future__ import annotations

import json

import killed_writers
import pytest
from processes import alone

from llama import files
from llama.files import check_new, new_directory, read_json, write_json


@pytest.mark.parametrize("how", ["calls", "random"])
def test_a_writer_killed_at_any_moment_leaves_the_earlier_directory_or_the_new(tmp_path, how):
    done = alone(tmp_path / "printed", killed_writers.main, tmp_path / "below" / "out", how).end()
    assert done.codes == [0], done.err
    seen = json.loads(done.out)
    assert seen["kills"] >= 30 and seen["earlier"] + seen["new"] == seen["kills"]
    if how == "calls":  # the attack hit both sides of the two renames, and between them
        assert min(seen["earlier"], seen["new"], seen["folders left"]) > 3
        assert seen["set aside"] == 1


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

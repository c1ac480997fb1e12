"""The file of a long run: it continues that run and no other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import refuses

from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile, joined

IDENTITY = {"data": "novels", "seed": 0}


def saved(path, **identity):
    StateFile(path, {**IDENTITY, **identity}).save({"sums": [1.5]})
    return path


def test_the_same_run_finds_what_it_saved(tmp_path):
    state = StateFile(saved(tmp_path / "state"), IDENTITY)
    assert state.content is not None and state.content["sums"] == [1.5]
    state.clear()
    assert StateFile(tmp_path / "state", IDENTITY).content is None


def test_a_state_behind_a_link_is_cleared_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "disk/state")
    for _ in range(2):
        state = StateFile(saved(tmp_path / "state"), IDENTITY)
        assert (tmp_path / "disk/state").is_file()
        state.clear()
        assert not [*(tmp_path / "disk").iterdir()] and (tmp_path / "state").is_symlink()
        assert StateFile(tmp_path / "state", IDENTITY).content is None


@pytest.mark.parametrize(
    ("more", "name", "now"), [({"seed": 1}, "seed", 0), ({"model": 1}, "model", None)]
)
def test_another_value_is_named(tmp_path, more, name, now):
    path = saved(tmp_path / "state", **more)
    before = path.read_bytes()
    said = f"a run with another {name}: 1, now {now}; go on with the former {name}, or delete .*"
    refuses(said, StateFile, path, IDENTITY)
    assert path.read_bytes() == before


DIRTY = ["{", "", "[]", '{"importance": []}', '{"text": "a"}\n{"text": 1}', "\0" * 40]


@pytest.mark.parametrize("content", DIRTY)
def test_what_is_no_state_is_refused_and_stays(tmp_path, content):
    (tmp_path / "state").write_text(content)
    said = (
        f"is not the state of a run, or is damaged; choose another name, or delete {tmp_path}/run"
    )
    refuses(said, StateFile, tmp_path / "state", IDENTITY, folder=tmp_path / "run")
    assert (tmp_path / "state").read_text() == content


def test_what_was_edited_is_refused(tmp_path):
    path = saved(tmp_path / "state")
    path.write_text(path.read_text().replace("1.5", "1.25"))
    refuses("state is damaged: delete .*state to start again", StateFile, path, IDENTITY)
    assert "1.25" in path.read_text()


def test_a_state_of_other_versions_continues(tmp_path):
    path = saved(tmp_path / "state")
    content = json.loads(path.read_text())
    others = {**content["versions"], "python": "2.7", "torch": "1.0"}
    path.write_text(json.dumps({**content, "versions": others}))
    assert StateFile(path, IDENTITY).content["sums"] == [1.5]


def test_no_entry_of_an_identity_hides_another(tmp_path):
    assert joined({"a": 1}, {}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="two values for a, b: rename one of them"):
        joined({"a": 1, "b": 1, "c": 1}, {"b": 1, "a": 2})
    state = StateFile(tmp_path / "state", IDENTITY)
    for content in ({"run": 1}, {"sha256": 1}):
        refuses("two values for ", state.save, content, error=ValueError)


def test_a_part_may_have_parts_which_are_told_apart(tmp_path):
    state = StateFile(tmp_path / "state", IDENTITY)
    inside = state.part("one").part("two")
    inside.save({"sums": [1]})
    assert inside.path.name == "state.one.two"
    assert StateFile(inside.path, {**IDENTITY, "part": "one, two"}).content["sums"] == [1]
    refuses("part: 'one, two', now 'two'", StateFile, inside.path, {**IDENTITY, "part": "two"})


def test_an_identity_is_compared_as_the_file_has_it(tmp_path):
    StateFile(tmp_path / "state", {"layers": (1, 2)}).save({"sums": [1]})
    assert StateFile(tmp_path / "state", {"layers": [1, 2]}).content["sums"] == [1]


def test_numbers_of_numpy_are_those_of_the_file(tmp_path):
    StateFile(tmp_path / "state", {"n": np.int64(3)}).save({"counts": [np.int64(1), 2]})
    assert StateFile(tmp_path / "state", {"n": 3}).content["counts"] == [1, 2]
    assert json_digest([np.int64(1)]) == json_digest([1])

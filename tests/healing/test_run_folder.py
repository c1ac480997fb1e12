"""The folder of a training's checkpoints: what a kill leaves goes, what is damaged is refused."""

from __future__ import annotations

import json
import os

import pytest

from llama.files import lock_file
from short_gpt import ShortGPTError
from short_gpt.healing.trainer import finished_checkpoints, note_files, run_folder


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        checkpoint = tmp_path / "work" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter.bin").write_bytes(bytes(step))
        (checkpoint / "trainer_state.json").write_text("{}")
        note_files(checkpoint)
    return tmp_path / "work"


def names(folder) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def test_a_checkpoint_that_a_kill_cut_short_goes(folder):
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{")
    assert finished_checkpoints(folder) and names(folder) == {"checkpoint-1"}
    (folder / "checkpoint-1" / "adapter.bin").unlink()
    assert not finished_checkpoints(folder) and not names(folder)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        json.dumps({"run": "checkpoint", "files": {"adapter.bin": "0" * 64}}),
        json.dumps({"run": "checkpoint", "files": {}, "sha256": "0" * 64}),
    ],
)
def test_digests_that_were_damaged_are_refused_and_nothing_goes(folder, text):
    (folder / "checkpoint-2" / "digests.json").write_text(text)
    message = rf"checkpoint-2/digests.json is damaged: delete {folder} to start"
    with pytest.raises(ShortGPTError, match=message):
        finished_checkpoints(folder)
    assert names(folder) == {"checkpoint-1", "checkpoint-2"}


def test_a_folder_in_use_is_left_as_it_is(folder):
    """Another process's unfinished checkpoint is no remainder."""
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    lock = lock_file(folder.parent / ".work.lock")
    with (
        pytest.raises(ShortGPTError, match="work is in use by another process"),
        run_folder(folder, {}, resume=True),
    ):
        pass
    assert names(folder) == {"checkpoint-1", "checkpoint-2"}
    os.close(lock)

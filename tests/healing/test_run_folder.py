"""The folder of a training's checkpoints: what a kill leaves goes, what others work on stays."""

from __future__ import annotations

import os

import pytest

from llama.files import lock_file
from short_gpt import ShortGPTError
from short_gpt.healing.trainer import LAST, run_folder


@pytest.fixture
def folder(tmp_path):
    work = tmp_path / "work"
    with run_folder(work, {"seed": 0}):
        for step in (1, 2):
            checkpoint = work / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            for name in ("adapter.bin", "trainer_state.json"):
                (checkpoint / name).write_bytes(bytes(step))
            (checkpoint / LAST).write_text("adapter.bin\ntrainer_state.json")
    return work


def names(folder) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize("lost", [LAST, "adapter.bin"])
def test_a_checkpoint_that_a_kill_cut_short_goes(folder, lost):
    for number, left in ((2, {"checkpoint-1"}), (1, set())):
        (folder / f"checkpoint-{number}" / lost).unlink()
        with run_folder(folder, {"seed": 0}) as (place, begun):
            assert (place, begun, names(folder)) == (folder, bool(left), left)


def test_checkpoints_of_another_run_are_refused_and_stay(folder):
    with (
        pytest.raises(ShortGPTError, match="another seed: 0, now 1"),
        run_folder(folder, {"seed": 1}),
    ):
        pass
    assert names(folder) == {"checkpoint-1", "checkpoint-2"}


def test_a_folder_in_use_is_left_as_it_is(folder):
    """Another process's unfinished checkpoint is no remainder."""
    (folder / "checkpoint-2" / LAST).unlink()
    lock = lock_file(folder.parent / ".work.lock")
    with (
        pytest.raises(ShortGPTError, match="work is in use by another process"),
        run_folder(folder, {"seed": 0}),
    ):
        pass
    assert names(folder) == {"checkpoint-1", "checkpoint-2"}
    os.close(lock)

"""The folder of a training's checkpoints: what a kill leaves goes, what others work on stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import interrupted, refuses

from llama.files import lock_file
from short_gpt import ShortGPTError
from short_gpt.healing.job import clear
from short_gpt.healing.trainer import LAST, RECIPE, _find_best, run_folder


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


def test_unfinished_checkpoints_of_another_run_stay_too(folder):
    (folder / "checkpoint-1" / LAST).unlink()
    with pytest.raises(ShortGPTError, match="another seed"), run_folder(folder, {"seed": 1}):
        pass
    (folder / RECIPE).unlink()  # such as another program's, which have neither
    with (
        pytest.raises(FileExistsError, match="they are another run's; name another folder"),
        run_folder(folder, {"seed": 0}),
    ):
        pass
    assert names(folder) == {"checkpoint-1", "checkpoint-2"}


def test_a_best_checkpoint_that_is_gone_is_no_fresh_adapter(folder):
    state = SimpleNamespace(best_model_checkpoint="elsewhere/checkpoint-1")
    _find_best(state, folder)
    assert state.best_model_checkpoint == str(folder / "checkpoint-1")
    shutil.rmtree(folder / "checkpoint-1")
    state.best_model_checkpoint = "elsewhere/checkpoint-1"
    refuses("checkpoint-1 is damaged", _find_best, state, folder)


def test_a_kill_while_checkpoints_are_removed_leaves_older_ones(tmp_path, monkeypatch):
    own = tmp_path / "lora"
    for step in (8, 9, 10):
        (own / f"checkpoint-{step}").mkdir(parents=True)
        (own / f"checkpoint-{step}" / LAST).write_text("")
    with interrupted(Path, "unlink", 2):
        clear(tmp_path)
    left = {path.parent.name for path in own.glob(f"*/{LAST}")}
    assert left == {"checkpoint-8"}
    clear(tmp_path)
    assert not tmp_path.exists()


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

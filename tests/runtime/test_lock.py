"""One process at a time works on a state, and a killed one holds nothing."""

from __future__ import annotations

import gc
import os

import children
import pytest
from conftest import random_windows, refuses, save_byte_llama
from families import make
from processes import started

from llama import files
from short_gpt import ShortGPTError, jobs
from short_gpt.healing import (
    Distillation,
    HealingJob,
    HealingWindows,
    Recipe,
    heal_lora,
    heal_refit,
)
from short_gpt.runtime.state import StateFile, hold
from short_gpt.wrappers.short_hf import ShortHFModel

IDENTITY = {"data": "novels"}


def test_a_second_process_is_told_who_works_on_a_state_until_that_is_killed(tmp_path):
    path = tmp_path / "scores.json.state"
    running = started(tmp_path / "first", children.holding, path)
    process = running.processes[0]
    before = path.read_bytes()
    for _ in range(2):  # being refused takes nothing away
        refuses("scores.json.state is in use by another process", StateFile, path, IDENTITY)
        assert path.read_bytes() == before
    other = StateFile(tmp_path / "other.state", IDENTITY)
    assert other.content is None  # a lock is of one state alone
    process.kill()
    running.end()
    assert (tmp_path / ".scores.json.state.lock").exists()  # but nobody holds it
    state = StateFile(path, IDENTITY)
    assert state.content["sums"] == [1.5]
    del state
    gc.collect()
    assert not (tmp_path / ".scores.json.state.lock").exists()


@pytest.mark.parametrize(("method", "kind"), [("refit", "refit"), ("refit,lora", "training")])
def test_a_second_healing_is_told_before_it_opens_the_model(tmp_path, monkeypatch, method, kind):
    save_byte_llama(tmp_path / "meta")
    running = started(tmp_path / "first", children.holding, tmp_path / f"out.{kind}")

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    for name in ("open_trainable", "open_model"):
        monkeypatch.setattr(f"short_gpt.jobs.healing.{name}", opened)
    (tmp_path / "book.txt").write_text("In the beginning")
    arguments = (str(tmp_path / "meta"), str(tmp_path / "out"))
    how = {"layers": [2], "data": str(tmp_path / "book.txt"), "heal_by": method}
    how["stream"] = method == "refit"
    said = f"out.{kind} is in use by another process"
    refuses(said, jobs.heal, *arguments, **how)
    running.processes[0].kill()
    running.end()
    refuses("was opened", jobs.heal, *arguments, **how, error=AssertionError)


def test_every_kind_of_state_is_one_processs_alone(tmp_path):
    path, short = tmp_path / "work", ShortHFModel(make("llama"))
    windows = random_windows(4, 16)
    running = started(tmp_path / "first", children.holding, path)
    recipe, parts = (
        Recipe(rank=4, steps=1, batch_size=1),
        HealingWindows(windows[:2], windows[2:3], windows[3:]),
    )
    for work in (
        lambda: heal_refit(short, [2], windows, work_dir=path, progress=False),
        lambda: heal_lora(short, windows[:3], windows[3:], recipe=recipe, work_dir=path),
        lambda: Distillation(path, short, windows),
        lambda: HealingJob(short, parts, [2], steps={"patch": None}, work_dir=path).run(),
    ):
        refuses("work is in use by another process", work)
    assert short.kept == [*range(6)] and not short.changes
    running.processes[0].kill()
    running.end()


def test_one_process_does_not_wait_for_itself(tmp_path):
    first = StateFile(tmp_path / "state", IDENTITY)
    second = StateFile(tmp_path / "state", IDENTITY)  # as of a run that was interrupted
    part = second.part("search")
    part.save({"x": 1})
    assert hold(tmp_path / "state") is first._lock is second._lock is part._lock
    around = hold(tmp_path / "work")
    assert hold(tmp_path / "work" / "refit") is around  # who has a folder has what is in it
    assert hold(tmp_path / "works") is not around
    assert {path.name for path in tmp_path.glob(".*")} == {".state.lock", ".work.lock"}
    first.clear()
    second.clear()
    del part, around
    gc.collect()
    assert not any(tmp_path.glob(".*"))


def test_of_several_ranks_the_first_holds_it_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for rank, locks in (("1", []), ("0", [".state.lock"])):
        monkeypatch.setenv("RANK", rank)
        state = StateFile(tmp_path / "state", IDENTITY)
        assert [path.name for path in tmp_path.iterdir()] == locks
        del state


def test_a_fork_neither_has_the_lock_nor_takes_it_away(tmp_path):
    lock = hold(tmp_path / "state")
    child = os.fork()
    if not child:
        code = 1
        try:
            hold(tmp_path / "state")
        except ShortGPTError:
            code = 0
        del lock
        gc.collect()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / ".state.lock").exists()
    with pytest.raises(BlockingIOError):
        files.lock_file(tmp_path / ".state.lock")
    del lock
    assert not any(tmp_path.iterdir())


def test_where_there_are_no_locks_a_run_goes_without(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("short_gpt.runtime.state.lock_file", none)
    StateFile(tmp_path / "state", IDENTITY).save({"sums": [1]})
    assert StateFile(tmp_path / "state", IDENTITY).content["sums"] == [1]


def test_a_lock_file_of_another_user_is_a_lock(tmp_path, monkeypatch):
    running = started(tmp_path / "first", children.holding, tmp_path / "state")
    really = os.open

    def refused(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR and str(path).endswith(".state.lock"):
            raise PermissionError(13, "Permission denied", path)  # another user made the file
        return really(path, flags, *mode)

    monkeypatch.setattr(files.os, "open", refused)
    refuses("in use by another process", StateFile, tmp_path / "state", IDENTITY)
    running.processes[0].kill()
    running.end()
    assert StateFile(tmp_path / "state", IDENTITY).content is not None  # nobody holds it


def test_a_folder_that_was_made_for_a_lock_goes_with_it_unless_it_is_used(tmp_path):
    lock = hold(tmp_path / "new/inside/state")
    assert (tmp_path / "new/inside/.state.lock").is_file()
    del lock
    assert not (tmp_path / "new").exists()
    lock = hold(tmp_path / "used/state")
    (tmp_path / "used/state").write_text("{}")
    del lock
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["state"]
    (tmp_path / "empty").mkdir()
    lock = hold(tmp_path / "empty/state")
    del lock
    assert (tmp_path / "empty").is_dir()

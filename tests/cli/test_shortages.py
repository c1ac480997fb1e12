"""What runs short, or is closed: one line that helps, and no result lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import DATA, fails, run

from short_gpt.cli.app import PipeSafeStream, message_of

RANK = ("rank", "ckpt", *DATA, "--max_windows", 2, "--json", "a.json")


def allocate(size: int):
    return lambda *_, **__: torch.empty(size)


def refuse(error: BaseException):
    def raising(*_, **__):
        raise error

    return raising


@pytest.mark.parametrize(
    "short", [allocate(2**50), refuse(MemoryError()), refuse(torch.OutOfMemoryError("CUDA out of "
              "memory. Tried to allocate 2.00 GiB."))]
)  # fmt: skip
def test_out_of_memory_is_one_line_that_says_what_to_change(ckpt, capsys, monkeypatch, short):
    monkeypatch.setattr("short_gpt.models.decoder.MetaDecoder.run", short)
    line = fails(capsys, *RANK)
    assert "not enough memory (" in line and "smaller --batch_size" in line and "--stream" in line
    assert sorted(os.listdir()) == ["book.txt", "ckpt"]


@pytest.mark.parametrize("command", ["prune", "rank"])
def test_a_full_disk_is_one_line_and_leaves_nothing(ckpt, capsys, monkeypatch, command):
    full = refuse(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr("short_gpt.checkpoints.meta.write_shard", full)
    monkeypatch.setattr("short_gpt.runtime.state.record_text", full)
    if command == "prune":
        line = fails(capsys, "prune", "ckpt", "x", "--layers", 1)
    else:
        with pytest.raises(SystemExit) as stop:
            run(*RANK)
        line = capsys.readouterr().err
        assert stop.value.code == 1
    assert (
        "the disk is full, or cannot be written to ([Errno 28] No space left" in line
        and "free some space" in line
    )
    assert sorted(os.listdir()) == ["book.txt", "ckpt"]


def test_a_shortage_behind_another_error_is_told():
    try:
        try:
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        except RuntimeError as error:
            raise ValueError("cannot be saved") from error
    except ValueError as error:
        assert "the disk is full" in str(message_of(error))
    assert message_of(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize("how", [">&-", "2>&- | (read -r line; echo $line)"])
def test_no_result_is_lost_where_nobody_listens(ckpt, how):
    words = " ".join(map(str, RANK))
    command = f"set -o pipefail; '{sys.executable}' -m short_gpt {words} {how}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert json.loads(Path("a.json").read_text())["command"] == "rank"


def test_a_terminal_that_knows_ascii_alone_gets_the_text_all_the_same(ckpt):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    line = "-m short_gpt generate ckpt caf\u00e9 --max_new_tokens=2"
    command = [sys.executable, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caf\\xe9")


@pytest.mark.parametrize("lines", [True, False])
def test_a_stream_whose_reader_has_left_takes_what_is_written(lines):
    read, written = os.pipe()
    stream = PipeSafeStream(os.fdopen(written, "wb", closefd=False), "utf-8", line_buffering=lines)
    os.close(read)
    for text in ("one\n", "x" * 100_000, "two\n"):  # a line, more than a buffer holds, what follows
        assert stream.write(text) == len(text)
    stream.close()
    os.close(written)

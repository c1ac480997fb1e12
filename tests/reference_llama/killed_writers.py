"""Kills writers of a directory; run by `test_killed_writers`, in a process of its own.

A child made by fork writes the directory and is killed: at every call that touches the file system,
one after the other, or at random moments while it writes over and over. After each kill the
directory must be the earlier one or a new one, whole, once the next writer has looked; and behind
that writer there must be nothing else.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from llama import files
from llama.files import check_new, new_directory, read_json, write_json

EVENTS = ("open", "os.", "shutil.", "ctypes.")


def write(out: Path, number: int) -> None:
    """A directory whose three files say the same number."""
    with new_directory(out, marker="mark.json", overwrite=True) as partial:
        write_json(partial / "mark.json", {"number": number})
        (partial / "below").mkdir()
        for name in ("a", "below/b"):
            (partial / name).write_text(str(number))


def number_in(out: Path) -> int:
    """The number that all files of a whole directory say."""
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    mark = read_json(out / "mark.json")
    assert names == sorted(mark["files"]) == ["a", "below/b", "mark.json"]
    numbers = {mark["number"], int((out / "a").read_text()), int((out / "below/b").read_text())}
    assert len(numbers) == 1, numbers
    return numbers.pop()


def kill_at(event_number: int) -> None:
    """Kills this process in front of its n-th call that touches the file system."""
    seen = [0]

    def hook(event: str, _: object) -> None:
        if event.startswith(EVENTS):
            seen[0] += 1
            if seen[0] == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(out: Path, event_number: int) -> bool:
    """Whether a child that writes number 2 was killed at that call; False if it was done before."""
    child = os.fork()
    if not child:
        try:
            kill_at(event_number)
            write(out, 2)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def killed_at_random(out: Path, wait: float) -> None:
    """Kills a child that writes number 2 over and over."""
    child = os.fork()
    if not child:
        try:
            while True:
                write(out, 2)
        finally:
            os._exit(1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def look(out: Path, seen: dict[str, int], *, atomic: bool) -> None:
    """Checks what a kill left, and that the next writer leaves nothing else."""
    left = [p for p in out.parent.iterdir() if p != out]
    seen["folders left"] += len(left)
    if atomic:
        assert out.is_dir(), "gone between two renames"
    seen["set aside"] += not out.is_dir()
    check_new(out, marker="mark.json", overwrite=True)
    seen["earlier" if number_in(out) == 1 else "new"] += 1
    write(out, 1)
    assert number_in(out) == 1
    assert list(out.parent.iterdir()) == [out], list(out.parent.iterdir())


def main(out: Path, how: str) -> None:
    """Prints what the kills left, as JSON.

    Args:
        out: the directory that is written.
        how: "calls" kills at every call, "renames" does where names cannot be exchanged in one
            step, "random" kills 30 times at random moments.
    """
    if how == "renames":
        files.exchange = lambda *_: False
    out.parent.mkdir()
    seen = dict.fromkeys(("kills", "earlier", "new", "folders left", "set aside"), 0)
    write(out, 1)
    random.seed(0)
    while seen["kills"] < 30 if how == "random" else killed(out, seen["kills"] + 1):
        if how == "random":
            killed_at_random(out, random.random() / 50)
        seen["kills"] += 1
        look(out, seen, atomic=how != "renames")
    print(json.dumps(seen))

"""Hidden folders that a writer works in, and the step that puts the result in its target's place.

Wherever a writer is killed, its target is the earlier directory or the new one, whole; what else
is left lies in the folder. A living writer holds a lock on its own, so that the next one knows
which folders nobody works in any more: it puts back what was set aside there, and removes them.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK, NEW, ASIDE = "lock", "new", "old"  # in a writer's folder
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, <fcntl.h> and <linux/fs.h>


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, which no other writer touches; it is gone afterwards.

    It lies there and not in the system's folder because a rename works only inside one file
    system. What was set aside in it, and not replaced, is put back.
    """
    work, lock = _made(path)
    try:
        yield work
    finally:
        _clear(work, path)
        if lock is not None:
            os.close(lock)


def tidy(path: Path) -> None:
    """Puts back what a killed writer of ``path`` had set aside, and removes what it left."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.writing-[0-9a-f]{{8}}")
    if not (path.parent.is_dir() and os.access(path.parent, os.R_OK | os.W_OK)):
        return
    for work in [p for p in path.parent.iterdir() if pattern.fullmatch(p.name)]:
        try:
            lock = _locked(work)
        except OSError:
            continue
        _clear(work, path)
        os.close(lock)


def follow_umask(folder: Path) -> None:
    """Gives the files below a folder the mode that the umask leaves, by that of the folder.

    safetensors writes files that their owner alone can read.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o666 != mode:
            with suppress(OSError):  # of a file system without modes
                path.chmod(mode)


def put_in_place(new: Path, path: Path, aside: Path) -> None:
    """Renames ``new`` to ``path``; an earlier directory there goes, in the same step if it can.

    Args:
        new: the finished directory.
        path: its place.
        aside: where an earlier directory lies in between where the system has no such step.
    """
    if not path.exists():
        new.rename(path)
    elif not exchange(new, path):
        path.rename(aside)
        new.rename(path)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False, and nothing done, where the system cannot.

    Linux can, by renameat2(2), on most of its file systems.
    """
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _made(path: Path) -> tuple[Path, int | None]:
    """A new folder with its lock; None where the file system has none."""
    while True:
        work = path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")
        work.mkdir()
        try:
            return work, _locked(work)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer took it for one that a killed writer left
        except OSError:
            return work, None


def _locked(work: Path) -> int:
    """Locks a folder; OSError if a living writer holds it, if it is gone, or without locks."""
    return lock_file(work / LOCK)


def lock_file(path: Path) -> int:
    """Makes a file, and locks it until the handle that is returned is closed.

    Raises:
        BlockingIOError: another process, or another handle of this one, holds the lock.
        FileNotFoundError: its folder is not there, or whoever held the lock has removed the file.
        OSError: it cannot be written, or there are no locks here.
    """
    if sys.platform == "win32":
        raise OSError("no locks here")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's file, which can be locked all the same
        lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(path)):
            raise FileNotFoundError(f"{path} was removed")
    except BaseException:
        os.close(lock)
        raise
    return lock


def _clear(work: Path, path: Path) -> None:
    """Removes a folder, the lock last; what it had set aside is put back first."""
    if (work / ASIDE).exists() and not path.exists():
        (work / ASIDE).rename(path)
    for inside in [p for p in work.iterdir() if p.name != LOCK] if work.is_dir() else []:
        shutil.rmtree(inside, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)

"""Files and directories that appear complete or not at all, and never replace somebody's files.

A writer works in a hidden folder beside its target and renames the result at the end, and holds a
lock meanwhile; the next writer puts back what a killed one had set aside, and removes its folder.
A directory's marker, a JSON file, lists all files of the directory; only a directory whose marker
lists every file in it is ever replaced.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llama.errors import InputError, check_file, damaged

if sys.platform != "win32":
    import fcntl

FILES = "files"  # the marker's key of the list
LOCK, NEW, ASIDE = "lock", "new", "old"  # in a writer's folder
CHUNK_BYTES = 16 * 2**20
LONGEST_NAME = 200  # bytes; most systems take 255, and files beside have longer ones
IsKind = Callable[[Path], bool]
StrPath = str | os.PathLike[str]


def check_new(
    path: Path, *, marker: str | None = None, overwrite: bool = False, source: Path | None = None
) -> None:
    """Raises FileExistsError or PermissionError where `new_directory`, called so, could not write.

    A directory is replaced only if its marker lists all that is in it. ``source``, what the content
    is made from, must not lie in it.
    """
    target = resolved(path)
    tidy(target)
    if not path.exists():
        check_writable(path)
    elif not path.is_dir():
        raise _exists(path, " and is not a directory")
    elif not (overwrite and marker):
        raise _exists(path)
    elif not (path / marker).is_file():
        raise _exists(path, f" and holds no {marker}")
    else:
        listed = read_json(path / marker).get(FILES) or []
        if others := [name for name in contents(path) if name not in listed]:
            raise _exists(path, f" and holds {others[0]}, which its {marker} does not list")
        if source is not None and resolved(source).is_relative_to(target):
            raise _exists(path, f" and holds the source {source}")
        check_writable(path)


def _exists(path: Path, reason: str = "") -> FileExistsError:
    way = "" if reason else " or pass `overwrite`"
    return FileExistsError(f"{path} exists{reason}; choose another name{way}")


def contents(directory: Path) -> list[str]:
    """Relative names of all files below, sorted; also of links to folders and of empty folders."""
    below = directory.rglob("*")
    named = [p for p in below if p.is_symlink() or not p.is_dir() or not any(p.iterdir())]
    return sorted(path.relative_to(directory).as_posix() for path in named)


def resolved(path: Path) -> Path:
    """The path without symbolic links; one that leads back to itself stays."""
    return Path(os.path.realpath(path))


def check_writable(path: Path) -> None:
    """Raises PermissionError if ``path`` could not be created; for a check before long work."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {parent} is not a writable directory")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise InputError(f"{path.name}: expected a name of at most {LONGEST_NAME} bytes")


@contextmanager
def new_directory(
    path: Path, *, marker: str | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """A directory that appears complete or not at all.

    Yields a folder to write into, which is renamed to ``path`` when the block ends and deleted
    when it raises. Checks of the content belong into the block: until it ends, an earlier
    directory stays as it is.

    Args:
        path: The new directory.
        marker: Name of the JSON file, written in the block, that gets the list of files. None
            leaves a directory that is never replaced.
        overwrite: Replace an existing directory, if its marker lists all in it. Default: False.
    """
    path = resolved(path)
    check_new(path, marker=marker, overwrite=overwrite)
    with _work_folder(path) as work:
        partial = work / NEW
        yield partial
        if marker is not None:
            content = read_json(partial / marker)
            write_json(partial / marker, {**content, FILES: contents(partial)})
        follow_umask(partial)
        check_new(path, marker=marker, overwrite=overwrite)  # it may have appeared meanwhile
        if path.exists():
            path.rename(work / ASIDE)
        partial.rename(path)


def read_marker(path: Path) -> JsonObject:
    """A marker's content without the list of files, which holds for its own directory alone."""
    return {key: value for key, value in read_json(path).items() if key != FILES}


def check_output(path: Path, *, overwrite: bool, replaces: IsKind) -> None:
    """Raises FileExistsError or PermissionError where `new_file`, called so, could not write."""
    target = resolved(path)
    tidy(target)
    if path.exists() and not path.is_file():
        raise _exists(path, " and is a directory" if path.is_dir() else " and is no file")
    if path.exists() and not overwrite:
        raise _exists(path)
    if path.exists() and path.stat().st_size and not replaces(path):
        raise _exists(path, " and is not what this would write there")
    check_writable(target)


@contextmanager
def new_file(path: Path, *, overwrite: bool, replaces: IsKind) -> Iterator[Path]:
    """A file that appears complete or not at all.

    Yields a path of the same name, which is renamed to ``path`` when the block ends; a link is
    followed. An existing file is replaced with ``overwrite``, if ``replaces`` says that it is of
    this kind, or if it is empty.
    """
    check_output(path, overwrite=overwrite, replaces=replaces)
    target = resolved(path)
    with _work_folder(target) as work:
        yield (file := work / NEW / path.name)
        follow_umask(work)
        check_output(path, overwrite=overwrite, replaces=replaces)  # it may have appeared since
        os.replace(file, target)


@contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` (a rename needs one file system), gone afterwards."""
    created, lock = missing(path.parent), None
    while True:
        work = path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")
        work.mkdir(parents=True)
        try:
            lock = lock_file(work / LOCK)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer took it for a killed one's before it was locked
        except OSError:  # the file system has no locks
            pass
        break
    (work / NEW).mkdir()
    try:
        yield work
    finally:
        _clear(work, path)
        remove_empty(created)
        if lock is not None:
            os.close(lock)


def missing(folder: Path) -> list[Path]:
    """The folder and those around it that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def tidy(path: Path) -> None:
    """Puts back what a killed writer of ``path`` had set aside, and removes its folder."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.writing-[0-9a-f]{{8}}")
    if not (path.parent.is_dir() and os.access(path.parent, os.R_OK | os.W_OK)):
        return
    for work in [*path.parent.iterdir()]:
        if not pattern.fullmatch(work.name) or work.is_symlink():  # no writer makes a link
            continue
        try:
            lock = lock_file(work / LOCK)
        except OSError:
            continue  # a living writer holds it, or there are no locks here
        _clear(work, path)
        os.close(lock)


def _clear(work: Path, path: Path) -> None:
    """Removes a folder, the lock last; what it had set aside is put back first."""
    if (work / ASIDE).exists() and not path.exists():
        (work / ASIDE).rename(path)
    for inside in [p for p in work.iterdir() if p.name != LOCK] if work.is_dir() else []:
        shutil.rmtree(inside, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def file_chunks(path: Path, start: int, nbytes: int) -> Iterator[bytes]:
    """Bytes of a file in pieces of at most 16 MiB; InputError where the file ends before."""
    with open(path, "rb") as file:
        file.seek(start)
        while nbytes:
            piece = file.read(min(nbytes, CHUNK_BYTES))
            check_file(piece, path, "it was cut off while it was read")
            nbytes -= len(piece)
            yield piece


def follow_umask(folder: Path) -> None:
    """Gives the files below, which safetensors makes private, the mode that the umask leaves."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o666 != mode:
            with suppress(OSError):  # of a file system without modes
                path.chmod(mode)


def lock_file(path: Path) -> int:
    """Makes a file, and locks it until the handle that is returned is closed.

    BlockingIOError if the lock is held; FileNotFoundError if folder or file are gone; OSError if it
    cannot be written, or there are no locks here.
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


JsonObject = dict[str, Any]


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file; InputError if it holds no JSON, or not one object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return json_object(path.read_bytes(), str(path))


def json_object(text: str | bytes, where: str) -> JsonObject:
    """The JSON object that a text ``where`` holds; InputError if it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"it is not JSON: {error}") from None
    kind = type(content).__name__
    check_file(isinstance(content, dict), where, f"expected one JSON object, got a {kind}")
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes an object as `json_text`."""
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: Mapping[str, object]) -> str:
    """An object as JSON, lists of numbers on one line; NaN and infinities become null."""
    return _json(content, "\n") + "\n"


def _json(value: object, line: str) -> str:
    """``line`` is the line break with the indentation."""
    inner = line + " "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(k))}: {_json(v, inner)}" for k, v in value.items()]
        return "{" + inner + ("," + inner).join(items) + line + "}" if items else "{}"
    if isinstance(value, list | tuple):
        if any(isinstance(v, Mapping | list | tuple) for v in value):
            return "[" + inner + ("," + inner).join(_json(v, inner) for v in value) + line + "]"
        with suppress(ValueError):  # of a NaN or an infinity
            return json.dumps(value, allow_nan=False, default=operator.index)
        return "[" + ", ".join(_json(v, inner) for v in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value, default=operator.index)  # whole numbers of numpy

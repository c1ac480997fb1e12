"""Directories that appear whole or not at all, and never in the place of somebody's files.

A writer's directory holds a marker, a JSON file whose name the writer chooses. When the directory
is complete, the marker gets a list of all files in it. Only what is listed there may ever be
replaced: a file that somebody put beside them keeps the directory as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.io.json_files import JsonObject, read_json, write_json
from llama.io.swap import ASIDE, NEW, follow_umask, put_in_place, tidy, work_folder

FILES = "files"  # the marker's key of the list


def check_new(
    path: Path, *, marker: str | None = None, overwrite: bool = False, source: Path | None = None
) -> None:
    """Raises FileExistsError or PermissionError where `new_directory` could not go.

    What a killed writer of the same directory has left is put back, or removed.

    Args:
        path, marker, overwrite: as for `new_directory`.
        source: what the new content is made from; it must not lie in the directory replaced.
    """
    tidy(resolved(path))
    _check_free(path, marker, overwrite=overwrite)
    within = [] if source is None else [source.resolve(), *source.resolve().parents]
    if path.exists() and path.resolve() in within:
        raise FileExistsError(f"{path} holds the source {source}; choose another directory")
    check_writable(path)


def _check_free(path: Path, marker: str | None, *, overwrite: bool) -> None:
    """Raises FileExistsError unless there is nothing, or what may be replaced."""
    if path.exists() and not (overwrite and marker):
        raise FileExistsError(f"{path} exists; choose another directory or pass `overwrite`")
    if path.exists():
        _check_replaceable(path, str(marker))


def resolved(path: Path) -> Path:
    """The path without symbolic links; FileExistsError where they go round in a circle."""
    try:
        target = path.resolve()
    except (RuntimeError, OSError):
        target = path
    # Python 3.13 gives back what it cannot resolve, earlier versions raise
    if any(part.is_symlink() for part in (target, *target.parents)):
        raise FileExistsError(
            f"{path} is a symbolic link that leads back to itself; choose another path"
        )
    return target


def _check_replaceable(path: Path, marker: str) -> None:
    """Raises FileExistsError unless the marker is there and lists all that is in the directory."""
    if not (path / marker).is_file():
        raise FileExistsError(
            f"{path} exists and holds no {marker}, so it is not overwritten; choose another "
            "directory"
        )
    listed = read_json(path / marker).get(FILES)
    if not isinstance(listed, list):
        raise FileExistsError(
            f"{path} exists, and its {marker} does not list what was written with it (earlier "
            "versions wrote no list), so it is not overwritten; delete it or choose another "
            "directory"
        )
    others = [name for name in _contents(path) if name not in listed]
    if others:
        raise FileExistsError(
            f"{path} exists and holds {others[0]}, which its {marker} does not list, so it is not "
            "overwritten; choose another directory"
        )


def _contents(directory: Path) -> list[str]:
    """Relative names of all files below, sorted; also of links to folders and of empty folders."""
    names_below: list[str] = []
    for folder, folders, files in os.walk(directory):  # does not follow links
        here = Path(folder)
        names = files + [name for name in folders if (here / name).is_symlink()]
        inside = [(here / name).relative_to(directory).as_posix() for name in names]
        empty = not folders and not files and here != directory
        names_below += [here.relative_to(directory).as_posix()] if empty else inside
    return sorted(names_below)


def check_writable(path: Path) -> None:
    """Raises PermissionError if ``path`` could not be created; for a check before long work."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {parent} is no writable directory")


@contextmanager
def new_directory(
    path: Path, *, marker: str | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    Gives a folder to write into; it takes its place when the block ends well and is deleted
    when it does not. What is to prove the content belongs into the block: until it ends, an
    earlier directory stays as it is. A process killed at any moment leaves the earlier directory
    or the new one, and the next writer of ``path`` removes what else it left.

    Args:
        path: the new directory.
        marker: name of the JSON file, written in the block, that gets the list of files. None
            leaves a directory that is never replaced.
        overwrite: whether an existing directory is replaced, if its marker lists all in it.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.

    Example:
        >>> with new_directory(out, marker="conversion.json") as partial:  # doctest: +SKIP
        ...     write_json(partial / "conversion.json", {"source": "llama-2-7b"})
    """
    path = resolved(path)
    check_new(path, marker=marker, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(path) as work:
        partial = work / NEW
        partial.mkdir()
        yield partial
        if marker is not None:
            _list_contents(partial, marker)
        follow_umask(partial)
        _check_free(path, marker, overwrite=overwrite)  # somebody may have made it meanwhile
        put_in_place(partial, path, work / ASIDE)


def _list_contents(directory: Path, marker: str) -> None:
    """Puts the list of files into the marker, which is one of them."""
    content = read_json(directory / marker)
    write_json(directory / marker, {**content, FILES: _contents(directory)})


def read_marker(path: Path) -> JsonObject:
    """A marker's content without the list of files, which holds for its own directory alone."""
    return {key: value for key, value in read_json(path).items() if key != FILES}

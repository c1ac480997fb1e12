"""Single files that a run writes: whole or not at all, and never in the place of somebody's.

Pipes and character devices are written to, as they are; what else is no regular file is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llama.io.files import check_writable, resolved
from llama.io.swap import NEW, follow_umask, tidy, work_folder

# Names of open files, which may be regular ones: whoever opened them wants the bytes there.
OPEN_FILES = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
Ours = Callable[[Path], bool]


def check_output(path: Path, *, overwrite: bool, ours: Ours) -> None:
    """Raises FileExistsError or PermissionError where `new_file` could not write.

    Args:
        path: as there.
        overwrite: as there.
        ours: as there.
    """
    if is_stream(path):
        return
    tidy(resolved(path))
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; choose another name")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is neither a file nor a pipe; choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass `overwrite`")
    if path.exists() and path.stat().st_size and not ours(path):
        raise FileExistsError(
            f"{path} exists and is not what this would write there, so it is not overwritten; "
            "choose another name"
        )
    check_writable(resolved(path))


@contextmanager
def new_file(path: Path, *, overwrite: bool, ours: Ours) -> Iterator[Path]:
    """A file that appears whole or not at all.

    Gives a path to write to; the file takes its place when the block ends well. Into a pipe or a
    character device the whole content goes then.

    Args:
        path: the file; a link is followed.
        overwrite: whether an existing file is replaced.
        ours: whether an existing file is such a one as this writes; no other is replaced, but an
            empty one.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.
    """
    check_output(path, overwrite=overwrite, ours=ours)
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            content = Path(folder) / NEW
            yield content
            _send(content, path)
        return
    target = resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(target) as work:
        yield work / NEW
        follow_umask(work)
        os.replace(work / NEW, target)


@contextmanager
def new_files(paths: Sequence[Path], *, overwrite: bool, ours: Ours) -> Iterator[list[Path]]:
    """Files of one model, which are there together or not at all.

    One file is as with `new_file`. Several take their places when the block ends well, the first
    one last: it names the others, so that until then there is no model. They replace nothing.

    Args:
        paths: the files, in one directory.
        overwrite: as there, for a single file.
        ours: as there, for a single file.

    Raises:
        FileExistsError: one of them exists and is not to be replaced.
    """
    if len(paths) == 1:
        with new_file(paths[0], overwrite=overwrite, ours=ours) as partial:
            yield [partial]
        return
    check_outputs(paths, overwrite=overwrite, ours=ours)
    targets = [resolved(path) for path in paths]
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    with work_folder(targets[0]) as work:
        yield [work / path.name for path in paths]
        follow_umask(work)
        check_outputs(paths, overwrite=overwrite, ours=ours)  # somebody may have made one
        _place(work, targets)


def _place(work: Path, targets: Sequence[Path]) -> None:
    """Moves files to their places, the first one last; after an error none of them is there."""
    placed: list[Path] = []
    try:
        for target in reversed(targets):
            (work / target.name).rename(target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink()
        raise


def check_outputs(paths: Sequence[Path], *, overwrite: bool, ours: Ours) -> None:
    """Raises FileExistsError or PermissionError where `new_files` could not write."""
    if len(paths) == 1:
        check_output(paths[0], overwrite=overwrite, ours=ours)
        return
    for path in paths:
        if path.exists():
            raise FileExistsError(
                f"{path} exists; files of a model in several are not overwritten: delete them or "
                "choose another name"
            )
    tidy(resolved(paths[0]))
    check_writable(resolved(paths[0]))


def is_stream(path: Path) -> bool:
    """Whether a path is written to and not replaced: a pipe, a terminal, another open file."""
    named = os.path.abspath(path).startswith(OPEN_FILES)
    return path.is_fifo() or path.is_char_device() or (named and path.exists())


def _send(content: Path, stream: Path) -> None:
    handle = os.open(stream, os.O_WRONLY | os.O_APPEND)
    with content.open("rb") as source, os.fdopen(handle, "wb") as sink:
        shutil.copyfileobj(source, sink)

"""One process at a time works on a state: a file, or a folder with all that is in it.

The lock is the operating system's (flock), on a hidden file beside the state, so that a process
that was killed holds nothing. Windows, and file systems that know no locks, go without.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary, finalize

from llama.io.files import lock_file
from short_gpt.runtime.errors import ShortGPTError

LONGEST = 300  # letters of what is said of a process


class Lock:
    """A state that this process holds, for as long as something here refers to this object.

    Args:
        path: the state's file or folder, which need not be there yet.

    Raises:
        ShortGPTError: another process holds it; the message says which.
    """

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        target = path.resolve()
        file = target.with_name(f".{target.name}.lock")
        handle = _locked(path, file)
        if handle is not None:
            with suppress(OSError):  # a full disk
                os.ftruncate(handle, 0)
                os.write(handle, _this_process().encode(errors="replace"))
            finalize(self, _release, handle, file, self.process)

    def __enter__(self) -> Lock:
        return self  # the with statement keeps the object to its end

    def __exit__(self, *_: object) -> None: ...


_HELD: WeakValueDictionary[Path, Lock] = WeakValueDictionary()
_ASKING = threading.Lock()  # two threads of a process share its locks


def hold(path: str | os.PathLike[str]) -> Lock:
    """The lock of a state; the one that this process has already, of it or of a folder around it.

    One process that holds a folder does not keep out another that holds a folder inside it.

    Raises:
        ShortGPTError: another process holds it; the message says which.

    Example:
        >>> lock = hold("scores.json.state")  # doctest: +SKIP
    """
    target = Path(path).resolve()
    with _ASKING:
        for around in (target, *target.parents):
            lock = _HELD.get(around)
            if lock is not None and lock.process == os.getpid():  # else a fork's copy
                return lock
        lock = _HELD[target] = Lock(Path(path))
        return lock


def _locked(path: Path, file: Path) -> int | None:
    """The open and locked file; None where there are no locks."""
    for _ in range(100):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return lock_file(file)
        except BlockingIOError:
            raise ShortGPTError(
                f"{path} is in use by {_holder(file)}; wait until that has ended, or end it"
            ) from None
        except FileNotFoundError:
            continue  # whoever held it has just removed it
        except OSError:
            break
    return None


def _release(handle: int, file: Path, process: int) -> None:
    """Removes the file while it is still locked; a fork's copy only closes its own."""
    if os.getpid() == process:
        with suppress(OSError):
            file.unlink()
    os.close(handle)


def _this_process() -> str:
    """Which process this is, since when it holds the lock, and what was asked of it; one line."""
    file, *arguments = sys.argv or [""]
    program = Path(file)  # of python -m the file __main__.py in the package
    name = program.parent.name if program.stem == "__main__" else program.name
    command = " ".join([name, *arguments])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    told = f"process {os.getpid()} on {platform.node()} since {since}: {command}"
    return " ".join(told.split())[:LONGEST]


def _holder(file: Path) -> str:
    """What the process that holds a lock says of itself."""
    with suppress(OSError):
        said = file.read_text(encoding="utf-8", errors="replace").split()
        if said:
            return " ".join(said)[:LONGEST]
    return "another process"

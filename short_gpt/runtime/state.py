"""What a run writes: its result, the state that it continues from, and the lock on that state."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from weakref import WeakValueDictionary, finalize

import torch

from llama.files import (
    JsonObject,
    json_text,
    lock_file,
    missing,
    new_file,
    read_json,
    remove_empty,
    tidy,
)
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError, damaged
from short_gpt.runtime.progress import is_first_rank

ABOUT = ("versions", "machine")  # entries of every record
CHECKED = "sha256"  # the entry with the digest of all entries except these
PACKAGES = ("short-gpt", "torch", "fairscale", "datasets", "transformers", "numpy")
# entries of a run's identity that it has only where they are others
USUAL = {"precision": "float32"}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, where installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def machine() -> dict[str, object]:
    """The system, processor, cores and threads, and the CUDA devices present."""
    about: dict[str, object] = {"system": f"{platform.system()} {platform.machine()}"}
    about |= {"processor": _processor(), "cores": os.cpu_count()}
    about["torch_threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
        about["cuda"] = ", ".join(dict.fromkeys(names))
    return about


def environment() -> str:
    """`machine` and `versions` in two lines, as a notebook shows them."""
    counted = [f"{v} {k}" if isinstance(v, int) else str(v) for k, v in machine().items() if v]
    return ", ".join(counted) + "\n" + ", ".join(f"{k} {v}" for k, v in versions().items())


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def write_record(
    path: str | os.PathLike[str], content: Mapping[str, object], *, overwrite: bool = False
) -> Path:
    """Writes ``content``, its digest, `versions` and `machine`; replaces only such a record."""
    target = Path(str(path))
    with new_file(target, overwrite=overwrite, replaces=is_record) as partial:
        partial.write_text(record_text(content), encoding="utf-8")
    return target


def record_text(content: Mapping[str, object]) -> str:
    """What `write_record` writes."""
    checked = {**content, CHECKED: content_digest(content)}
    return json_text({**checked, "versions": versions(), "machine": machine()})


def content_digest(content: Mapping[str, object]) -> str:
    """The digest of a record's own entries, as they are written or as they are read again."""
    own = {name: content[name] for name in content if name not in (CHECKED, *ABOUT)}
    return sha256(json_text(own).encode()).hexdigest()


def is_record(path: Path) -> bool:
    """Whether a file is one that `write_record` wrote."""
    try:
        content = read_json(path)
    except (OSError, ShortGPTError):
        return False
    return "versions" in content and "machine" in content


def read_record(path: str | os.PathLike[str]) -> JsonObject:
    """What `write_record` wrote."""
    return read_json(Path(str(path)))


class Lock:
    """A lock on a state, held for as long as something refers to this object.

    It is flock's, on a hidden file next to the state; where there is no flock, nothing is locked.
    Of several ranks the first holds it for all.
    """

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        target = path.resolve()
        file = target.with_name(f".{target.name}.lock")
        created = missing(file.parent)
        with suppress(OSError):  # where there are no locks
            if is_first_rank():
                finalize(self, _release, _locked(path, file), file, self.process, created)

    def __enter__(self) -> Lock:
        return self  # the with statement keeps the object to its end

    def __exit__(self, *_: object) -> None: ...


_HELD: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def hold(path: str | os.PathLike[str]) -> Lock:
    """The lock of a state; the one that this process already has of it or of a folder around it.

    A process that holds a folder does not keep out another one that holds a folder inside it.
    """
    target = Path(path).resolve()
    for around in (target, *target.parents):
        lock = _HELD.get(around)
        if lock is not None and lock.process == os.getpid():  # else a fork's copy
            return lock
    lock = _HELD[target] = Lock(Path(path))
    return lock


def _locked(path: Path, file: Path) -> int:
    """The open and locked file; OSError where there are no locks."""
    for _ in range(100):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return lock_file(file)
        except BlockingIOError:
            raise ShortGPTError(
                f"{path} is in use by another process; wait until that has ended, or end it"
            ) from None
        except FileNotFoundError:
            continue  # its last holder has just removed it
    raise OSError("no lock can be written here")


def _release(handle: int, file: Path, process: int, created: Sequence[Path]) -> None:
    """Removes the file while it is still locked; a fork's copy only closes its own."""
    if os.getpid() == process:
        with suppress(OSError):
            file.unlink()
            remove_empty(created)
    os.close(handle)


def joined(*parts: Mapping[str, object]) -> dict[str, object]:
    """All entries of several mappings; ValueError where two have a name in common."""
    entries: dict[str, object] = {}
    for part in parts:
        if common := sorted(entries.keys() & part.keys()):
            raise ValueError(f"two values for {', '.join(common)}: rename one of them")
        entries |= part
    return entries


def check_saved(path: Path, digest: str, *, folder: Path) -> None:
    """Raises `damaged_run` unless a file of a run has the `files_digest` that it was saved with."""
    if not path.is_file() or files_digest([path]) != digest:
        raise damaged_run(path, folder)


def damaged_run(path: Path, folder: Path) -> ShortGPTError:
    """The error of a missing or changed file of a run; to start again ``folder`` must go."""
    reason = "" if path.is_file() else "it is missing"
    return damaged(path, reason, mend=f"delete {folder} to start again")


class StateFile:
    """A JSON file that a long run is saved in, with what the run depends on.

    No other process works on it until this object is gone, or cleared.

    Args:
        path: the file; each save replaces it.
        identity: what the run depends on, by the names that an error shows: model, data, seed...
        every: seconds between two saves.
        lock: of the folder that it belongs to; None locks the file alone.
        folder: what an error asks the user to delete; None is the file.

    Attributes:
        content: what the file holds; None if there is none.

    Raises:
        ShortGPTError: the file is of another run, which the message tells apart, or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, object],
        *,
        every: float = 120.0,
        lock: Lock | None = None,
        folder: Path | None = None,
    ) -> None:
        self.path, self.every = Path(str(path)), every
        self._folder = folder or self.path
        self._lock: Lock | None = hold(self.path) if lock is None else lock
        self._identity: JsonObject = json.loads(json_text(identity))  # as a file has it
        self._saved = time.monotonic()
        self._content = self._load() if self.path.exists() else None
        self._read = True  # as the file is now

    @property
    def content(self) -> JsonObject | None:
        if not self._read:
            self._content, self._read = self._load() if self.path.exists() else None, True
        return self._content

    def _load(self) -> JsonObject:
        try:
            content = read_record(self.path)
        except ShortGPTError:
            content = {}
        if not isinstance(run := content.get("run"), dict):
            raise ShortGPTError(
                f"{self.path} is not the state of a run, or is damaged; choose another name, or "
                f"delete {self._folder} to start again"
            )
        saved, current = {**USUAL, **run}, {**USUAL, **self._identity}
        for name in {**current, **saved}:
            if saved.get(name) != current.get(name):
                raise ShortGPTError(
                    f"{self.path} is the state of a run with another {name}: "
                    f"{saved.get(name)!r}, now {current.get(name)!r}; go on with the former "
                    f"{name}, or delete {self._folder} to start again"
                )
        if content.get(CHECKED) != content_digest(content):
            raise damaged_run(self.path, self._folder)
        return content

    def part(self, name: str) -> StateFile:
        """The state, in a file of its own, of a run inside this one."""
        path = self.path.with_name(f"{self.path.name}.{name}")
        outer = self._identity.get("part")  # of a part's part
        identity = {**self._identity, "part": f"{outer}, {name}" if outer else name}
        return StateFile(path, identity, every=self.every, lock=self._lock)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.every

    def save(self, content: Mapping[str, object]) -> None:
        """Replaces the file."""
        own = {"run": self._identity, CHECKED: None}  # the digest is the record's
        write_record(self.path, joined(own, content), overwrite=True)
        self._content, self._read, self._saved = None, False, time.monotonic()

    def clear(self) -> None:
        """Deletes the file, once the result is safe, and what a killed save may have left.

        A link stays, and what it leads to goes: that is what `save` wrote.
        """
        target = self.path.resolve()
        tidy(target)
        target.unlink(missing_ok=True)
        self._content, self._read, self._lock = None, True, None

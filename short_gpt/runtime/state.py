"""The state of a long run on disk, so that it can be interrupted and continued."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from llama.io.files import tidy
from llama.io.json_files import JsonObject
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.lock import Lock, hold
from short_gpt.runtime.progress import first_rank
from short_gpt.runtime.results import CHECKED, content_digest, read_record, write_record


def joined(*parts: Mapping[str, object]) -> dict[str, object]:
    """All entries of several mappings, of which an identity or a state is put together.

    Raises:
        ValueError: two of them have a name in common, so that one value would hide the other.

    Example:
        >>> joined({"weights": "3f2a"}, {"layers": [21, 22]})
        {'weights': '3f2a', 'layers': [21, 22]}
    """
    whole: dict[str, object] = {}
    for part in parts:
        if common := sorted(whole.keys() & part.keys()):
            raise ValueError(f"two values for {', '.join(common)}: name one of them otherwise")
        whole |= part
    return whole


def check_saved(path: Path, digest: str, *, whole: Path) -> None:
    """Raises ShortGPTError unless a file of a run holds what was saved there.

    Args:
        path: of the file.
        digest: from `digest.files_digest`, as it was saved.
        whole: what is to be deleted for the run to begin anew.
    """
    if not path.is_file():
        raise missing(path, whole)
    if files_digest([path]) != digest:
        raise damaged(path, whole)


def missing(path: Path, whole: Path) -> ShortGPTError:
    """The error of a file that a run would go on from, and that is gone."""
    return ShortGPTError(
        f"{path} is missing, from which the run would go on; delete {whole} to begin anew"
    )


def damaged(path: Path, whole: Path) -> ShortGPTError:
    """The error of a file that a run would go on from, and that is another than was saved."""
    return ShortGPTError(
        f"{path} does not hold what was saved there: it was edited or is damaged; delete {whole} "
        "to begin anew"
    )


class StateFile:
    """A JSON file that a long run is saved in, with what the run depends on.

    No other process works on it before this object is gone, or cleared. Of several ranks that
    share it the first holds it for all.

    Args:
        path: written whole, replaced by the next save.
        identity: what the run depends on, by the names that an error shows: model, data, seed...
        every: seconds between two saves.
        lock: of what it is a part of, such as a folder; None holds the file alone.
        whole: what an error tells the user to delete; None is the file.

    Attributes:
        content: what the file held; None if there is none.

    Raises:
        ShortGPTError: the file holds the state of another run, and the message names what differs,
            or something else than what was saved; or another process works on it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, object],
        *,
        every: float = 120.0,
        lock: Lock | None = None,
        whole: Path | None = None,
    ) -> None:
        self.path = Path(str(path))
        self._whole = whole or self.path
        self.every = every
        self._lock = hold(self.path) if lock is None and first_rank() else lock
        self._identity: JsonObject = json.loads(json.dumps(dict(identity)))  # as a file has it
        self._saved = time.monotonic()
        self.content = self._load()

    def _load(self) -> JsonObject | None:
        if not self.path.exists():
            return None
        found = read_record(self.path)
        theirs = found.get("run")
        if not isinstance(theirs, dict):
            raise ShortGPTError(f"{self.path} is no state of a run; choose another name")
        # a run keeps the same entries from one save to the next, so other ones are another format
        if theirs.keys() != self._identity.keys():
            other = ", ".join(sorted(theirs.keys() ^ self._identity.keys()))
            raise ShortGPTError(
                f"{self.path} is the state of another version of this library, or of another "
                f"command (it differs in what a state tells of: {other}); delete {self._whole} "
                "or name another state"
            )
        for name, value in self._identity.items():
            if theirs.get(name) != value:
                raise ShortGPTError(
                    f"{self.path} is the state of a run with another {name}: "
                    f"{theirs.get(name)!r}, now {value!r}; go on with the former {name}, or delete "
                    f"{self._whole} to begin anew"
                )
        if CHECKED not in found:
            raise ShortGPTError(
                f"{self.path} is the state of another version of this library; delete "
                f"{self._whole} or name another state"
            )
        try:
            as_saved = found[CHECKED] == content_digest(found)
        except RecursionError:  # nested deeper than anything that is saved
            as_saved = False
        if not as_saved:
            raise damaged(self.path, self._whole)
        return found

    def part(self, name: str) -> StateFile:
        """The state, in a file of its own, of a run inside this one."""
        path = self.path.with_name(f"{self.path.name}.{name}")
        identity = joined(self._identity, {"part": name})
        return StateFile(path, identity, every=self.every, lock=self._lock)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.every

    def save(self, content: Mapping[str, object]) -> None:
        """Replaces the file."""
        own = {"run": self._identity, CHECKED: None}  # the digest is the record's
        write_record(self.path, joined(own, content), overwrite=True)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Deletes the file, once the result is safe, and what a killed save may have left."""
        tidy(self.path.resolve())
        self.path.unlink(missing_ok=True)
        self._lock = None

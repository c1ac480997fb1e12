"""The state of a scoring run on disk, so that it can be interrupted and continued."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from short_gpt.importance import Importance
from short_gpt.record import read_record, write_record


class StateFile:
    """A JSON file that a long run is saved in, with what the run depends on.

    Args:
        path: written whole, replaced by the next save.
        identity: what the run depends on, by the names that an error shows: model, data, seed...
        every: seconds between two saves.

    Attributes:
        content: what the file held; None if there is none.

    Raises:
        ValueError: the file holds the state of another run; the message names what differs.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Mapping[str, Any], *, every: float = 120.0
    ) -> None:
        self.path = Path(str(path))
        self.every = every
        self._identity = dict(identity)
        self._saved = time.monotonic()
        self.content = self._load()

    def _load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        found = read_record(self.path)
        theirs = found.get("run")
        if not isinstance(theirs, dict):
            raise ValueError(f"{self.path} is no state of a run; choose another name")
        for name in (*self._identity, *(theirs.keys() - self._identity.keys())):
            value = self._identity.get(name)
            if theirs.get(name) != value:
                raise ValueError(
                    f"{self.path} is the state of a run with another {name}: "
                    f"{theirs.get(name)!r}, now {value!r}; delete it or name another state"
                )
        return found

    def part(self, name: str) -> StateFile:
        """The state, in a file of its own, of a run inside this one."""
        path = self.path.with_name(f"{self.path.name}.{name}")
        return StateFile(path, {**self._identity, "part": name}, every=self.every)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.every

    def save(self, content: Mapping[str, Any]) -> None:
        """Replaces the file."""
        write_record(self.path, {"run": self._identity, **content}, overwrite=True)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Deletes the file, once the result is safe, and what a killed save may have left."""
        for path in (self.path, *self.path.parent.glob(f".{self.path.name}.partial-*")):
            with suppress(FileNotFoundError):
                path.unlink()


class RunState:
    """The state of a scoring run: its sums, and a digest of the windows they are of.

    Args:
        file: where it is saved.
    """

    def __init__(self, file: StateFile) -> None:
        self.file = file
        self._texts: dict[int, str] = {}  # digest of the first windows, by their number
        self._hash = hashlib.sha256()

    def sums(self, layers: Sequence[int]) -> Importance:
        """The sums to continue from: those of the file, or empty ones.

        Raises:
            ValueError: the file scores other layers.
        """
        if self.file.content is None:
            return Importance.empty(layers)
        sums = Importance.from_dict(self.file.content.get("importance", {}))
        if sums.layers != list(layers):
            raise ValueError(
                f"{self.file.path} scores the layers {sums.layers}, not {list(layers)}"
            )
        return sums

    def unread(self, windows: Iterable[Sequence[int]], read: int) -> Iterator[Sequence[int]]:
        """The windows that follow the first ``read``, which are compared with the file's.

        Raises:
            ValueError: the windows are not those that the state was made of.
        """
        rest, found, count = iter(windows), self.file.content, 0
        for count, window in enumerate(islice(rest, read), 1):  # noqa: B007
            self.note([window])
        if count < read:
            raise ValueError(
                f"{self.file.path} is the state of a run that has read {read} windows, now there "
                f"are {count}; take as many, delete it or name another state"
            )
        if found is not None and self._texts.get(read) != found.get("texts"):
            raise ValueError(
                f"{self.file.path} is the state of a run on other texts or windows; delete it or "
                "name another state"
            )
        return rest

    def note(self, batch: Sequence[Sequence[int]]) -> None:
        """Tells of windows that are read next."""
        for window in batch:
            self._hash.update(torch.tensor([len(window), *window]).numpy().tobytes())
        before = max(self._texts, default=0)
        after = before + len(batch)
        self._texts = {before: self._texts.get(before, ""), after: self._hash.hexdigest()}

    def tick(self, sums: Importance) -> None:
        """Saves if it is time to."""
        if self.file.due():
            self.save(sums)

    def save(self, sums: Importance) -> None:
        """Saves the sums of the windows read so far, unless there are none."""
        texts = self._texts.get(sums.n_windows)
        if sums.n_windows and texts:
            self.file.save({"texts": texts, "importance": sums.to_dict()})


def weights_digest(model: nn.Module, samples: int = 64) -> str:
    """A digest of names, shapes, dtypes and a sample of the values of all parameters."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        few = flat[:: max(1, len(flat) // samples)][:samples].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(few.numpy().tobytes())
    return digest.hexdigest()[:16]

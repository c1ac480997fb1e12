"""The state of a scoring run on disk, so that it can be interrupted and continued."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch

from short_gpt.runtime.digest import Digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance


class RunState:
    """The state of a scoring run: its sums, and a digest of the windows they are of.

    Args:
        file: where it is saved.
    """

    def __init__(self, file: StateFile) -> None:
        self.file = file
        self._texts: dict[int, str] = {}  # digest of the first windows, by their number
        self._digest = Digest()

    def sums(self, layers: Sequence[int]) -> Importance:
        """The sums to continue from: those of the file, or empty ones.

        Raises:
            ShortGPTError: the file scores other layers.
        """
        if self.file.content is None:
            return Importance.empty(layers)
        sums = Importance.from_dict(self.file.content.get("importance", {}))
        if sums.layers != list(layers):
            raise ShortGPTError(
                f"{self.file.path} scores the layers {sums.layers}, not {list(layers)}"
            )
        return sums

    def unread(self, windows: Iterable[Sequence[int]], read: int) -> Iterator[Sequence[int]]:
        """The windows that follow the first ``read``, which are compared with the file's.

        Only once they are the file's is there anything to save: a refusal leaves the file as it is.

        Raises:
            ShortGPTError: the windows are not those that the state was made of.
        """
        rest, found, count = iter(windows), self.file.content, 0
        for window in islice(rest, read):
            self._read(window)
            count += 1
        if count < read:
            raise ShortGPTError(
                f"{self.file.path} is the state of a run that has read {read} windows, now there "
                f"are {count}; take as many, delete it or name another state"
            )
        if found is not None and self._digest.whole != found.get("texts"):
            raise ShortGPTError(
                f"{self.file.path} is the state of a run on other texts or windows; delete it or "
                "name another state"
            )
        self._texts = {read: self._digest.whole}
        return rest

    def note(self, batch: Sequence[Sequence[int]]) -> None:
        """Tells of windows that are read next."""
        for window in batch:
            self._read(window)
        before = max(self._texts, default=0)
        after = before + len(batch)
        self._texts = {before: self._texts.get(before, ""), after: self._digest.whole}

    def _read(self, window: Sequence[int]) -> None:
        self._digest.add(torch.tensor([len(window), *window]).numpy().tobytes())

    def tick(self, sums: Importance) -> None:
        """Saves if it is time to."""
        if self.file.due():
            self.save(sums)

    def save(self, sums: Importance) -> None:
        """Saves the sums of the windows read so far, unless there are none."""
        texts = self._texts.get(sums.n_windows)
        if sums.n_windows and texts:
            self.file.save({"texts": texts, "importance": sums.to_dict()})

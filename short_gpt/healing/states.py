"""States of many windows, in memory or in a file, read and written batch by batch.

Shapes: B windows of a batch, S tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from short_gpt.runtime.digest import Digest


class States:
    """A state (B, S, W) for each of some batches, on the CPU.

    In a file they take memory for one batch alone, and outlive the process.

    Args:
        shapes: B and S of every batch.
        width: W.
        dtype: of all of them.
        path: the file, which is made where there is none of this size; None holds them in memory.
        hashed: whether `digest` is asked for.

    Example:
        >>> states = States([(1, 2)], 3, torch.float32)
        >>> states[0] = torch.zeros(1, 2, 3)
        >>> states[0].shape
        torch.Size([1, 2, 3])
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        width: int,
        dtype: torch.dtype,
        path: Path | None = None,
        *,
        hashed: bool = False,
    ) -> None:
        self._shapes = [(*shape, width) for shape in shapes]
        self._dtype, self._path, self._hashed = dtype, path, hashed
        self._held: dict[int, Tensor] = {}
        self._digests: dict[int, bytes] = {}  # of what was written last
        if path is not None:
            sizes = [B * S * width * dtype.itemsize for B, S in shapes]
            self._starts = list(accumulate(sizes, initial=0))
            path.touch()
            if path.stat().st_size != self._starts[-1]:
                with open(path, "r+b") as file:
                    file.truncate(self._starts[-1])

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, batch: int) -> Tensor:
        if self._path is None:
            return self._held[batch]
        state = torch.empty(self._shapes[batch], dtype=self._dtype)
        with open(self._path, "rb") as file:
            file.seek(self._starts[batch])
            file.readinto(_bytes_of(state))
        return state

    def __setitem__(self, batch: int, state: Tensor) -> None:
        state = state.detach().to("cpu", self._dtype).reshape(self._shapes[batch])
        if self._path is None:
            self._held[batch] = state
            return
        content = _bytes_of(state.contiguous())
        if self._hashed:
            self._digests[batch] = sha256(content).digest()
        with open(self._path, "r+b") as file:
            file.seek(self._starts[batch])
            file.write(content)

    @property
    def digest(self) -> str | None:
        """Of all batches, each hashed as it was written; None where one of them was not."""
        if len(self._digests) < len(self):
            return None
        return Digest(*(self._digests[batch] for batch in range(len(self)))).whole

    def read_digest(self) -> str:
        """The same, of the file as it is."""
        return Digest(*(sha256(_bytes_of(self[i])).digest() for i in range(len(self)))).whole


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data

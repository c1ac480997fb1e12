"""States of many windows, in memory or in a file, read and written batch by batch.

Shapes: B windows of a batch, S tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor


class States:
    """A state (B, S, W) for each of some batches, on the CPU.

    In a file they take memory for one batch alone, and outlive the process.

    Args:
        shapes: B and S of every batch.
        width: W.
        dtype: of all of them.
        path: the file, which is made where there is none of this size; None holds them in memory.

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
    ) -> None:
        self._shapes = [(*shape, width) for shape in shapes]
        self._dtype, self._path = dtype, path
        self._held: dict[int, Tensor] = {}
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
        with open(self._path, "r+b") as file:
            file.seek(self._starts[batch])
            file.write(_bytes_of(state.contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data

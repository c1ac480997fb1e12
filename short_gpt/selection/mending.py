"""Models that are healed while they are tried out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

Gap = tuple[int, int]  # places of the first and the last of removed layers that follow each other


class Mending(Protocol):
    """Changes the layer in front of every gap, for trials that score models as healed."""

    def prepare(self, gaps: Iterable[Gap]) -> None:
        """Finds the changes for these gaps; those for others may be forgotten."""

    def layers_run(self, gaps: Iterable[Gap]) -> int:
        """Layers, each on one window, that run where all of these gaps are new to `prepare`."""

    def mended(self, gaps: Iterable[Gap]) -> AbstractContextManager[None]:
        """The model with the changes for gaps that were prepared, inside a ``with`` block."""

"""Long runs that can be interrupted: the file they are saved in, and requests to end."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from llama.io.files import check_writable
from llama.io.outputs import is_stream
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile

S = TypeVar("S", bound="Saving")


@dataclass(frozen=True)
class Saving:
    """Where a run is saved, to be continued.

    Args:
        state: file that the run is saved in and continued from; that of the result with .state
            behind its name if not given.
    """

    state: str | None = None

    def beside(self: S, result: str | None) -> S:
        """The same, with a name made from the result's file where none is given.

        A pipe or a device has no place beside it: a run that writes there has a state only by name.
        """
        named = self.state is not None or result is None or is_stream(Path(result))
        return self if named else replace(self, state=f"{result}.state")

    def file(self, identity: Mapping[str, object], *, every: float = 120.0) -> StateFile | None:
        """The file, or None where it has no name; see `StateFile` for the arguments."""
        if self.state is None:
            return None
        path = Path(self.state)
        check_writable(path)
        return StateFile(path, identity, every=every)


@dataclass(frozen=True)
class TimedSaving(Saving):
    """Where and how often a run is saved.

    Args:
        save_every: seconds between two saves; 0 saves behind every batch.

    Raises:
        ShortGPTError: ``save_every`` is below 0, or no number.
    """

    save_every: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.save_every < math.inf:
            raise ShortGPTError(
                f"`save_every` {self.save_every}: expected seconds, 0 to save behind every batch"
            )


@contextmanager
def interruptible() -> Iterator[None]:
    """A request to end (SIGTERM) inside the block counts as Ctrl-C, so that work is saved."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

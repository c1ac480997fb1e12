"""Long runs that can be interrupted: the file they are saved in, and requests to end."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llama.io.files import check_writable, is_stream
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import WRITE, needs_one_of, setting
from short_gpt.wrappers.options import AUTO, OpenOptions

if TYPE_CHECKING:
    from short_gpt.runtime.state import StateFile

NAMED = needs_one_of("`state` or `json`", "state", "json")


@dataclass(frozen=True)
class Saving:
    """Where and how often a run is saved, to be continued.

    Args:
        state: file that the run is saved in and continued from; if not given, that of the result
            with .state appended to its name.
        save_every: seconds between two saves; 0 saves after every batch.
    """

    HEADING: ClassVar = WRITE
    state: str | None = setting(None, value="FILE")
    save_every: float = setting(120.0, commands=("rank", "reproduce"), needs=NAMED)

    def beside(self, result: str | None) -> Saving:
        """The same, by default with a file next to the result's; a pipe or device has none."""
        named = self.state is not None or result in (None, "-") or is_stream(Path(str(result)))
        return self if named else replace(self, state=f"{result}.state")

    def file(self, identity: Mapping[str, object]) -> StateFile | None:
        """The file, or None where it has no name; see `StateFile` for the identity."""
        from short_gpt.runtime.state import StateFile

        if self.state is None:
            return None
        path = Path(self.state)
        check_writable(path)
        return StateFile(path, identity, every=self.save_every)

    def __post_init__(self) -> None:
        if not 0 <= self.save_every < math.inf:
            raise ShortGPTError(
                f"`save_every` {self.save_every}: expected seconds, 0 to save after every batch"
            )


def as_begun(opening: OpenOptions, *states: str | Path | None) -> OpenOptions:
    """The options in the precision of the run that is continued, where `auto` would choose one."""
    from short_gpt.runtime.state import USUAL, read_record

    for path in states if opening.precision == AUTO else ():
        run = read_record(path).get("run") if path and Path(path).is_file() else None
        if isinstance(run, dict):
            return replace(opening, precision=str({**USUAL, **run}["precision"]))
    return opening


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

"""Standard output and error as they may be: closed, ASCII only, or a pipe that nobody reads.

What is printed is there for a reader; without one, the run goes on and its files are written.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class Unheard(io.TextIOWrapper):
    """A stream whose reader may leave; what is written from then on goes nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self.flush()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # also what is still in the buffer
            os.close(null)
            super().flush()


def lenient() -> None:
    """Makes standard output and error take anything, at any time."""
    sys.stdout, sys.stderr = _taking_all(sys.stdout), _taking_all(sys.stderr)


def _taking_all(stream: TextIO | None) -> TextIO:
    """The stream, or one in its place: for none, for a pipe, for one that knows few letters."""
    if stream is None:  # closed before the start: 2>&-
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper) and type(stream) is not Unheard and _is_own(stream):
        lines, code = stream.line_buffering, stream.encoding
        buffer = os.fdopen(stream.fileno(), "wb", closefd=False)
        return Unheard(buffer, code, errors="backslashreplace", line_buffering=lines)
    return stream


def _is_own(stream: TextIO) -> bool:
    """Whether it is the process's own output, and not one that somebody put in its place."""
    return stream in (sys.__stdout__, sys.__stderr__)

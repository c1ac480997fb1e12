"""The progress bar of every long run: items done, rate, time left."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from llama.ranks import is_distributed
from short_gpt.runtime.errors import ShortGPTError, refused

Bar = Any  # of tqdm, which has no types
_quiet = False  # whether neither bars nor notes are shown
A_YEAR = 365 * 86_400.0  # seconds
RARELY = 30.0  # seconds between two lines of a bar in a file
UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def be_quiet(on: bool) -> None:
    """Shows neither bars nor notes from now on, or shows them again."""
    global _quiet
    _quiet = on
    if on:  # those of other libraries too, which read these when they are imported
        os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    elif not sys.stderr.isatty():  # else a file would get each of their updates
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def is_quiet() -> bool:
    """Whether neither bars nor notes are shown."""
    return _quiet


def bar(
    desc: str, *, total: int | None, unit: str, show: bool = True, delay: float = 1.0, done: int = 0
) -> Bar:
    """A tqdm bar on stderr, for use in a ``with`` block; a silent one unless ``show``.

    Of several ranks only the first shows one. Short work stays quiet for ``delay`` seconds; 0 is
    for few long items. ``done`` of the total were done before a run was continued.
    """
    from tqdm import tqdm

    silent = _quiet or not (show and is_first_rank())
    how: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": done}
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # notebooks redraw a line, too
        how |= {"file": _Lines(), "mininterval": RARELY, "maxinterval": RARELY, "ncols": 100}
    return tqdm(**how, delay=delay, disable=silent)


class _Lines:
    """Stderr as a file of whole lines: one for each update of a bar, none for clearing it."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def print_above_bars(text: str) -> None:
    """Writes a note to stderr, above the bars that are shown there."""
    if _quiet:
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def is_first_rank() -> bool:
    """Whether this process speaks for all: rank 0 under torchrun, or the only one."""
    return not is_distributed() or os.environ["RANK"] == "0"


def check_alone(what: str) -> None:
    """Raises ShortGPTError where this process is one of several ranks."""
    if is_distributed():
        raise ShortGPTError(f"{what} runs on one rank; start it alone, not by torchrun")


def seconds_of(text: str | int) -> float:
    """Seconds of a text like "90s", "30m", "1.5 hours" or "2d"; a number alone counts minutes.

    Raises ShortGPTError for another text, and for no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    units = [unit for words, unit in UNITS if words.startswith(match[2] or "m")] if match else []
    if match is None or not units or not 0 < (seconds := float(match[1]) * units[0]) <= A_YEAR:
        raise refused("`time`", text, "a time of at most a year, such as 30m, 90s or 2h")
    return seconds


def duration(seconds: float) -> str:
    """A time to two digits.

    Example:
        >>> duration(0.034), duration(1), duration(86), duration(7500), duration(400_000)
        ('0.034 seconds', '1 second', '86 seconds', '2.1 hours', '4.6 days')
    """
    name, unit = next((u for u in UNITS if seconds >= 2 * u[1]), UNITS[-1])
    value = seconds / unit
    number = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
    return f"{number} {name.removesuffix('s') if number == '1' else name}"

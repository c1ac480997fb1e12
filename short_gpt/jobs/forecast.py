"""What a long run will take, said before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

from short_gpt.data.windows import count_of
from short_gpt.runtime import replicas
from short_gpt.scoring.stopping import Stop
from short_gpt.wrappers.scored_model import ScoredModel

W = TypeVar("W", bound=list[int])
UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def first_of(windows: Iterable[W]) -> tuple[W | None, Iterable[W]]:
    """The first window, and all of them, it included; None where there is none."""
    if count_of(windows) is not None:  # these can be iterated again
        return next(iter(windows), None), windows
    rest = iter(windows)
    first = next(rest, None)
    return first, rest if first is None else chain([first], rest)


def forecast(
    short: ScoredModel,
    window: list[int],
    *,
    batch_size: int = 1,
    rule: Stop | None = None,
    total: int | None = None,
    population: int | None = None,
    read: int = 0,
) -> str:
    """How long a run will take, from one window that is timed. All ranks must call it.

    Args:
        short: the model.
        window: one of the windows, read for nothing but this.
        batch_size: windows that each replica reads at once.
        rule: that may end the run early.
        total: windows to come and read; None if that is not known.
        population: windows that there are, of which these are a sample.
        read: how many of them were read before.
    """
    one = short.seconds_a_window(window, batch_size) / replicas.current(short.decoder.device).count
    line = f"a window of {len(window):,} tokens takes {duration(one)}"
    if total is None:
        return f"{line}; how many there are shows as they are read"
    parts = []
    first = total if rule is None else rule.first_look(population)
    if read < first < total:
        left = duration((first - read) * one)
        parts.append(f"{first:,} windows, where the answer may be settled, {left}")
    parts.append(f"all {total:,} {duration((total - read) * one)}")
    before = f"; {read:,} were read before" if read else ""
    return f"{line}: {'; '.join(parts)}{before}"


def duration(seconds: float) -> str:
    """A time to two digits.

    Example:
        >>> duration(0.034), duration(86), duration(7500), duration(400_000)
        ('0.034 seconds', '86 seconds', '2.1 hours', '4.6 days')
    """
    name, unit = next((u for u in UNITS if seconds >= 2 * u[1]), UNITS[-1])
    value = seconds / unit
    return f"{value:.0f} {name}" if value >= 10 else f"{value:.2g} {name}"

"""The progress bar of every long run: items done, rate, time left."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Protocol, TypeVar

from llama.ranks import several_ranks

Self = TypeVar("Self", bound="Bar")


class Bar(Protocol):
    """What is used of a tqdm bar."""

    @property
    def disable(self) -> bool: ...

    @property
    def format_dict(self) -> Mapping[str, float]: ...

    def update(self, n: float = ...) -> object: ...

    def set_postfix_str(self, text: str, refresh: bool = ...) -> None: ...

    def __enter__(self: Self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def bar(
    desc: str,
    *,
    total: int | None,
    unit: str,
    show: bool = True,
    delay: float = 1.0,
    done: int = 0,
) -> Bar:
    """A tqdm bar on stderr, for use in a ``with`` block; a silent one unless ``show``.

    It appears after ``delay`` seconds, so that short work stays quiet; 0 is for few long items,
    whose first one would end long after. ``done`` of the total are there already, of a run that is
    continued. Of several ranks only the first shows one.
    """
    from tqdm import tqdm

    silent = not (show and first_rank())
    return tqdm(total=total, desc=desc, unit=unit, delay=delay, initial=done, disable=silent)


def above_bars(text: str) -> None:
    """Writes a line to stderr, where the bars that stand there go on below it."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def first_rank() -> bool:
    """Whether this process speaks for all: rank 0 under torchrun, or the only one."""
    return not several_ranks() or os.environ["RANK"] == "0"


def set_rate(bar: Bar, tokens: int) -> None:
    """Shows the tokens per second since the bar began."""
    if not bar.disable:
        rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)

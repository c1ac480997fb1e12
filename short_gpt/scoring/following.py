"""How a run stands while it goes on: windows read, the choice so far, its least sure pair."""

from __future__ import annotations

import time
from collections.abc import Callable

from short_gpt.scoring.importance import Importance
from short_gpt.scoring.stopping import Stop


class Following:
    """Tells how a run stands, at its beginning and then at most once in so many seconds.

    Args:
        tell: is given one line.
        rule: whose choice is told of.
        stops: whether the rule may end the run; else all windows are read whatever it says.
        every: seconds.
    """

    def __init__(
        self, tell: Callable[[str], object], rule: Stop, *, stops: bool = True, every: float = 60.0
    ) -> None:
        self._tell, self._rule, self._stops, self._every = tell, rule, stops, every
        self._next = 0.0
        self._told = 0

    def __call__(self, importance: Importance, population: int | None) -> None:
        """Tells of the sums so far, where it is time to and there is something new."""
        read = importance.n_windows
        if read < 2 or read == self._told or time.monotonic() < self._next:
            return
        self._next, self._told = time.monotonic() + self._every, read
        self._tell(self.line(importance, population))

    def line(self, importance: Importance, population: int | None) -> str:
        """The line for these sums, of two windows or more."""
        rule = self._rule
        verdict = rule.judge(importance, population)
        layers = importance.least_important(rule.n, angular=rule.angular)
        of = "" if population is None else f" of {population:,}"
        needed, first = "", rule.first_look(population)
        if self._stops and verdict.windows < first:
            needed = f", looked at from {first:,} windows on"
        elif self._stops:
            needed = f", needed {verdict.needed:.2f}"
        return (
            f"{verdict.windows:,}{of} windows: {layers}; {verdict.closest}: z = {verdict.z:.2f}"
            f"{needed}"
        )

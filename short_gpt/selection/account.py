"""Losses of sets of layers, each measured once, within a budget of layers run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Layers = tuple[int, ...]  # places to remove, ascending


class Spent(Exception):
    """Ends an evolution whose budget allows no more."""


class Account:
    """Losses of sets of layers on batches of windows, each measured once, within a budget.

    Args:
        measure: from a set and the number of a batch to the summed loss, in nats.
        costs: for every batch, the layers that one measurement runs.
        budget: layers that may run in all.
        known: losses of a saved run; they count as if they were measured now, so that a run which
            continues decides as one that was never interrupted.

    Attributes:
        costs: as given.
        known: all that was measured.
        spent: layers run so far.
        reserve: of the budget, kept for what must be measured in any case.
    """

    def __init__(
        self,
        measure: Callable[[Layers, int], float],
        *,
        costs: Sequence[int],
        budget: int,
        known: Mapping[tuple[Layers, int], float] | None = None,
    ) -> None:
        self._measure, self.costs, self._budget = measure, costs, budget
        self.known = dict(known or {})
        self._counted: set[tuple[Layers, int]] = set()
        self.spent, self.reserve = 0, 0

    def nats(self, layers: Layers, batches: Sequence[int]) -> float:
        """The loss without the layers, summed over batches.

        Raises:
            Spent: the budget does not suffice for all of them; none is measured then.
        """
        new = [(layers, i) for i in batches if (layers, i) not in self._counted]
        cost = sum(self.costs[i] for _, i in new)
        if self.spent + cost > self._budget - self.reserve:
            raise Spent
        for key in new:
            if key not in self.known:
                self.known[key] = self._measure(*key)
        self._counted.update(new)
        self.spent += cost
        return sum(self.known[layers, i] for i in batches)

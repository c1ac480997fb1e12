"""Layers chosen by evolution: sets that keep their size while single layers change places.

After EvoPress (Sieberling et al. 2024, arXiv:2410.14649), for whole layers. A set of n layers has
offspring by *level switches*: one removed layer comes back and one that was there goes, once to
three times, few times more often. Selection takes *several steps*: all offspring are judged on few
windows drawn anew in every generation, the best of them on all, and the best of those and their
parent is the next parent. What is measured is the loss, where the authors take the divergence from
the whole model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from short_gpt.data.windows import batches
from short_gpt.models.decoder import Decoder, padded
from short_gpt.selection.search import PartialRun, Search

Layers = tuple[int, ...]  # places to remove, ascending
IDLE = 64  # generations in a row that measure nothing new, after which nothing more is expected


class Spent(Exception):
    """Ends an evolution whose budget allows no more."""


class Account:
    """Losses of sets of layers on batches of windows, each measured once, within a budget.

    Args:
        measure: from a set and the number of a batch to the summed loss, in nats.
        costs: for every batch, the layers that one measurement runs.
        budget: layers that may run in all.

    Attributes:
        spent: layers run so far.
        reserve: of the budget, kept for what must be measured in any case.
    """

    def __init__(
        self, measure: Callable[[Layers, int], float], *, costs: Sequence[int], budget: int
    ) -> None:
        self._measure, self.costs, self._budget = measure, costs, budget
        self._known: dict[tuple[Layers, int], float] = {}
        self.spent, self.reserve = 0, 0

    def nats(self, layers: Layers, batches: Sequence[int]) -> float:
        """The loss without the layers, summed over batches.

        Raises:
            Spent: the budget does not suffice for all of them; none is measured then.
        """
        new = [(layers, i) for i in batches if (layers, i) not in self._known]
        cost = sum(self.costs[i] for _, i in new)
        if self.spent + cost > self._budget - self.reserve:
            raise Spent
        for key in new:
            self._known[key] = self._measure(*key)
        self.spent += cost
        return sum(self._known[layers, i] for i in batches)


@dataclass(frozen=True)
class Evolution:
    """How a population evolves.

    Attributes:
        first: random sets that the first parent is chosen from.
        offspring: sets that a generation tries.
        survivors: of these, how many are judged on all windows.
        switches: most level switches that an offspring is from its parent.
        share: of the windows, that offspring are judged on first; at least one.
    """

    first: int = 16
    offspring: int = 8
    survivors: int = 2
    switches: int = 3
    share: float = 0.25


def evolve(
    account: Account,
    places: Sequence[int],
    n: int,
    *,
    settings: Evolution | None = None,
    seed: int = 0,
) -> Layers:
    """The best set of n places that evolution finds until the account is spent.

    Args:
        account: measures sets; it can afford one on all batches.
        places: that may be removed.
        n: how many of them.
        settings: of the population.
        seed: of all that is drawn.

    Example:
        >>> account = Account(lambda layers, _: abs(sum(layers) - 9.0), costs=[1], budget=100)
        >>> sum(evolve(account, range(8), 2))
        9
    """
    settings, draw = settings or Evolution(), random.Random(seed)
    every = range(len(account.costs))
    few = max(1, math.floor(len(every) * settings.share))
    account.reserve = sum(account.costs)
    parent = _first(account, places, n, draw.sample(every, few), settings, draw)
    account.reserve = 0
    least, idle = account.nats(parent, every), 0
    try:
        while idle < IDLE:
            before = account.spent
            born = list(_offspring(parent, places, settings, draw))
            sample = draw.sample(every, few)
            ranked = sorted((account.nats(child, sample), child) for child in born)
            for _, child in ranked[: settings.survivors]:
                if (nats := account.nats(child, every)) < least:
                    parent, least = child, nats
            idle = idle + 1 if account.spent == before else 0
    except Spent:
        pass
    return parent


def _first(
    account: Account,
    places: Sequence[int],
    n: int,
    sample: Sequence[int],
    settings: Evolution,
    draw: random.Random,
) -> Layers:
    """The best of random sets on a few windows; a random one where none can be tried so."""
    count = min(settings.first, math.comb(len(places), n))
    sets: dict[Layers, None] = {}
    while len(sets) < count:
        sets[tuple(sorted(draw.sample(list(places), n)))] = None
    judged: list[tuple[float, Layers]] = []
    try:
        for layers in sets:
            judged.append((account.nats(layers, sample), layers))
    except Spent:
        pass
    return min(judged)[1] if judged else next(iter(sets))


def _offspring(
    parent: Layers, places: Sequence[int], settings: Evolution, draw: random.Random
) -> Iterator[Layers]:
    """Different sets, each by level switches from the parent; fewer where there are no more."""
    seen = {parent}
    for _ in range(8 * settings.offspring):
        child, rest = list(parent), [i for i in places if i not in parent]
        # the less of two draws: few switches more often than many
        switches = min(draw.randint(1, settings.switches), draw.randint(1, settings.switches))
        for _ in range(switches if rest else 0):
            back, gone = draw.randrange(len(child)), draw.randrange(len(rest))
            child[back], rest[gone] = rest[gone], child[back]
        if (found := tuple(sorted(child))) not in seen:
            seen.add(found)
            yield found
        if len(seen) > settings.offspring:
            return


def evolution(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    candidates: Sequence[int],
    *,
    budget: float = 1.0,
    seed: int = 0,
) -> Search:
    """The n layers that evolution finds, within as many layer runs as `sleb_rounds` takes.

    Args:
        decoder: the model; it is left as it was.
        windows: token ids, each a batch of its own.
        n: how many layers, 1 to L - 2.
        candidates: positions that may be removed; the first and the last layer stay.
        budget: times the layers that `sleb` runs for the same n on the same windows.
        seed: of all that is drawn.

    Returns:
        A search that removed the set, in ascending order, and tells no losses.
    """
    part, count = PartialRun(decoder), len(decoder.layers)
    places = [i for i in range(1, count - 1) if i in candidates]
    read = [b for batch in batches(windows, 1) for b in padded(batch, decoder)]

    def nats(gone: Layers, batch: int) -> float:
        _, tokens, mask = read[batch]
        return part.nats(tokens, mask, [i for i in range(count) if i not in gone], None)

    layers = int(budget * len(windows) * sleb_layers(count, places, n))
    account = Account(nats, costs=[count - n] * len(read), budget=layers)
    best = evolve(account, places, n, seed=seed)
    return Search([*best])


def sleb_layers(count: int, places: Sequence[int], n: int) -> int:
    """Layers that `sleb` runs for one window at least, among candidates at these places.

    Args:
        count: of the model's layers.
        places: of the candidates.
        n: how many go.

    Example:
        >>> sleb_layers(8, range(1, 7), 1)  # trials run 6 + 5 + ... + 1, and 6 move on
        27
    """

    def run(order: Sequence[int]) -> int:
        gone: set[int] = set()
        total = max(places)  # in the first round the states move on to the last candidate
        for removed in order[:n]:
            alive = [i for i in range(count) if i not in gone]
            total += sum(1 for j in places if j not in gone for i in alive if i > j)
            gone.add(removed)
        return total

    return min(run(sorted(places)), run(sorted(places, reverse=True)))

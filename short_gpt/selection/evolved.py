"""Layers chosen by evolution on a model, within as many layer runs as a greedy search takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from short_gpt.evaluation.perplexity import check_loss, check_predicted
from short_gpt.models.decoder import Decoder
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.lists import layer_numbers
from short_gpt.selection.account import Account, Layers
from short_gpt.selection.evolution import Evolution, evolve
from short_gpt.selection.found import Options, Search
from short_gpt.selection.stack import Stack
from short_gpt.selection.trials import read_batches


def evolution(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    options: Options | None = None,
    *,
    budget: float = 1.0,
    settings: Evolution | None = None,
    seed: int = 0,
) -> Search:
    """Removes the n layers that evolution finds, within as many layer runs as `sleb` takes.

    The first and the last layer stay, as there. Every measurement runs all layers that are left;
    the first step of selection draws from batches, which are windows if these are read singly.

    Args:
        decoder: the model; it is left as it was.
        windows: token ids.
        n: how many layers, 1 to L - 2.
        options: how it runs; no states are stored.
        budget: times the layers that `sleb` runs for the same n on the same windows.
        settings: of the population.
        seed: of all that is drawn.

    Returns:
        The set in ascending order and the mean loss without it.

    Raises:
        ShortGPTError: n or the budget is out of range, or as in `decoder.pad`.
        NotFiniteError: a loss is NaN or infinite.
    """
    options, count = options or Options(), len(decoder.layers)
    places = options.allowed(count)
    check_count(n, count, most=len(places))
    model = _Model(decoder, windows, n, options)
    layers = int(budget * len(windows) * sleb_layers(count, places, n))
    if layers < sum(model.costs):
        raise ShortGPTError(
            f"budget = {budget}: {layers} layers on one window each do not suffice for one set, "
            f"which takes {sum(model.costs)}; give a larger one"
        )
    with bar("evolving", total=layers, unit="layer", show=options.progress) as shown:
        account = model.account(layers, shown.update)
        try:
            best = evolve(account, places, n, settings=settings, seed=seed)
        finally:
            model.save()
    nats = account.nats(best, range(len(model.costs)))
    return Search([*best], evaluations=account.spent, loss=nats / model.predicted)


def sleb_layers(count: int, places: Sequence[int], n: int) -> int:
    """Layers that `sleb` runs for one window at least, among candidates at these places.

    Where all but the ends are candidates, every search runs as many, but for the states that its
    memory does not hold.

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


class _Model:
    """Measures a model without sets of layers, and saves what it measured."""

    def __init__(
        self, decoder: Decoder, windows: Sequence[Sequence[int]], n: int, options: Options
    ) -> None:
        self._stack, self._count, self._n = Stack(decoder), len(decoder.layers), n
        self._state = options.state
        self._read = read_batches(windows, decoder, options.batch_size)
        self.predicted = sum(int(mask[:, 1:].sum()) for _, mask in self._read)
        check_predicted(self.predicted)
        self.costs = [len(tokens) * (self._count - n) for tokens, _ in self._read]

    def account(self, budget: int, tick: Callable[[int], object]) -> Account:
        """The losses that a saved run knows, to be added to; ``tick`` is told of layers run."""
        known = _saved(self._state, self._count, self._n)
        self._tick = tick
        self._account = Account(self._nats, costs=self.costs, budget=budget, known=known)
        return self._account

    def _nats(self, gone: Layers, batch: int) -> float:
        run = [place for place in range(self._count) if place not in gone]
        nats = self._stack.nats(*self._read[batch], run, None)
        check_loss(nats)
        self._tick(self.costs[batch])
        if self._state is not None and self._state.due():
            self.save()
        return nats

    def save(self) -> None:
        """Saves what is known, if it is to be saved."""
        if self._state is not None:
            known = [[*layers, i, nats] for (layers, i), nats in self._account.known.items()]
            self._state.save({"evolution": known})


def _saved(state: StateFile | None, count: int, n: int) -> dict[tuple[Layers, int], float]:
    """The losses that a state holds.

    Raises:
        ShortGPTError: it holds none of sets of n among so many layers.
    """
    if state is None or not state.content:
        return {}
    try:
        rows = [(row[:-2], row[-2], row[-1]) for row in state.content["evolution"]]
        known = {(tuple(layer_numbers(layers)), int(i)): float(nats) for layers, i, nats in rows}
        whole = all(len(layers) == n and max(layers) < count for layers, _ in known)
    except (KeyError, TypeError, ValueError, IndexError):
        whole = False
    if not whole:
        raise ShortGPTError(
            f"{state.path} is no whole state of an evolution; delete it to begin anew"
        )
    return known

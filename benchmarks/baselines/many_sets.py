"""Losses of a model without each of many sets of layers, which share what runs alike.

Sets that lack the same layers up to some place have the same state there: it runs once, and from
it on each goes its own way. Trials may be mended by `gap_refit.GapRefits`.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from benchmarks.baselines.gap_refit import Gap, GapRefits
from short_gpt.models.decoder import Decoder, pad
from short_gpt.models.numbering import runs
from short_gpt.selection.search import PartialRun

Layers = tuple[int, ...]  # places to remove, ascending
Item = tuple[bool, Gap | None]  # whether a layer runs, and the gap behind it that it is mended for


class ManySets:
    """A model without each of some sets of layers.

    Args:
        decoder: the model; it is left as it was.
        sets: places to remove, each ascending.
        mending: prepared for the gaps of all sets; None scores models as cut.
    """

    def __init__(
        self, decoder: Decoder, sets: Sequence[Layers], mending: GapRefits | None = None
    ) -> None:
        self._run, self._count = PartialRun(decoder), len(decoder.layers)
        self._mending = mending
        self._gaps = {layers: runs(layers, range(self._count)) for layers in sets}
        self._items = {layers: self._items_of(layers) for layers in sets}

    def _items_of(self, layers: Layers) -> list[Item]:
        ahead = {start - 1: (start, end) for start, end in self._gaps[layers]}
        mends = self._mending is not None
        return [
            (place not in layers, ahead.get(place) if mends and place not in layers else None)
            for place in range(self._count)
        ]

    def nats(self, tokens: Tensor, mask: Tensor) -> dict[Layers, float]:
        """The summed loss of windows by set; tokens and mask (B, S) as from `decoder.pad`."""
        return dict(self._walk(tokens, mask, 0, None, list(self._items)))

    def _walk(
        self, tokens: Tensor, mask: Tensor, place: int, state: Tensor | None, sets: list[Layers]
    ) -> Iterator[tuple[Layers, float]]:
        """Losses of sets that are alike in front of a place, from the state (B, S, D) there."""
        alike, stop = self._items[sets[0]], place
        while stop < self._count and all(self._items[s][stop] == alike[stop] for s in sets):
            stop += 1
        run = [i for i in range(place, stop) if alike[i][0]]
        with self._mended(sets[0]):
            if stop == self._count:
                yield sets[0], self._run.nats(tokens, mask, run, state)
                return
            state = self._run.advance(tokens, run, state)
        groups: dict[Item, list[Layers]] = {}
        for layers in sets:
            groups.setdefault(self._items[layers][stop], []).append(layers)
        for group in groups.values():
            yield from self._walk(tokens, mask, stop, state, group)

    def _mended(self, layers: Layers) -> AbstractContextManager[None]:
        return nullcontext() if self._mending is None else self._mending.mended(self._gaps[layers])


def greedy_healed(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    mending: GapRefits,
    candidates: Sequence[int],
) -> list[int]:
    """Removes greedily, n times, the layer without which the loss is lowest, gaps refitted.

    Args:
        decoder: the model; it is left as it was.
        windows: token ids that candidates are scored on, others than ``mending`` is fitted on.
        n: how many layers.
        mending: refits the layers in front of gaps.
        candidates: places that may be removed; the first and the last layer stay.

    Returns:
        The places, in order of removal.
    """
    removed: list[int] = []
    every = range(len(decoder.layers))
    for _ in range(n):
        left = [i for i in every[1:-1] if i in candidates and i not in removed]
        sets = {tuple(sorted([*removed, i])): i for i in left}
        mending.prepare({gap for layers in sets for gap in runs(layers, every)})
        many, loss = ManySets(decoder, [*sets], mending), dict.fromkeys(left, 0.0)
        for window in windows:
            for layers, nats in many.nats(*pad([window], decoder)).items():
                loss[sets[layers]] += nats
        removed.append(min(left, key=lambda i: (loss[i], i)))
    return removed

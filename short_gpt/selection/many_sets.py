"""Losses of a model without each of many sets of layers, which share what runs alike.

Sets that lack the same layers up to some place have the same state there: it runs once, and from
it on each goes its own way. Trials may be mended, as in `trials`.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from short_gpt.models.decoder import Decoder
from short_gpt.models.numbering import runs
from short_gpt.selection.mending import Gap, Mending
from short_gpt.selection.stack import Stack

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
        self, decoder: Decoder, sets: Sequence[Layers], mending: Mending | None = None
    ) -> None:
        self._stack, self._count = Stack(decoder), len(decoder.layers)
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
                yield sets[0], self._stack.nats(tokens, mask, run, state)
                return
            state = self._stack.advance(tokens, run, state)
        groups: dict[Item, list[Layers]] = {}
        for layers in sets:
            groups.setdefault(self._items[layers][stop], []).append(layers)
        for group in groups.values():
            yield from self._walk(tokens, mask, stop, state, group)

    def _mended(self, layers: Layers) -> AbstractContextManager[None]:
        return nullcontext() if self._mending is None else self._mending.mended(self._gaps[layers])

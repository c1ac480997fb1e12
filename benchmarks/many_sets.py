"""Losses of a model without each of many sets of layers, which share what runs alike.

Sets that lack the same layers up to some place have the same state there: it runs once, and from
it on each goes its own way.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from short_gpt.models.decoder import Decoder
from short_gpt.selection.partial_run import PartialRun

Layers = tuple[int, ...]  # places to remove, ascending


class ManySets:
    """A model without each of some sets of layers.

    Args:
        decoder: the model; it is left as it was.
        sets: positions to remove, each ascending.
    """

    def __init__(self, decoder: Decoder, sets: Sequence[Layers]) -> None:
        self._run, self._sets = PartialRun(decoder), list(sets)
        self._count = len(decoder.layers)

    def nats(self, tokens: Tensor, mask: Tensor) -> dict[Layers, float]:
        """The summed loss of windows by set; tokens and mask (B, S) as from `decoder.pad`."""
        return dict(self._walk(tokens, mask, 0, None, self._sets))

    def _walk(
        self, tokens: Tensor, mask: Tensor, first: int, state: Tensor | None, sets: list[Layers]
    ) -> Iterator[tuple[Layers, float]]:
        """Losses of sets that are alike before a layer, from the state (B, S, D) entering it."""
        stop = first
        while stop < self._count and len({stop in layers for layers in sets}) == 1:
            stop += 1
        run = [i for i in range(first, stop) if i not in sets[0]]
        if stop == self._count:
            yield sets[0], self._run.nats(tokens, mask, run, state)
            return
        state = self._run.advance(tokens, run, state)
        for lacks in (False, True):
            group = [layers for layers in sets if (stop in layers) == lacks]
            yield from self._walk(tokens, mask, stop, state, group)

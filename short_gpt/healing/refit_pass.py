"""One pass of the whole model and of what is left of it, layer by layer, which solves matrices.

Places are those of the layers in the decoder. Shapes: B windows, S tokens, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from short_gpt.healing.refit_layer import LayerRefit, Windows
from short_gpt.healing.refit_state import RefitState
from short_gpt.healing.solving import Solving
from short_gpt.healing.states import States
from short_gpt.models.layer_calls import LayerCalls


class RefitPass:
    """Solves the last matrices of the layers that stay, each on what those in front have become.

    Args:
        calls: of a decoder with all its layers, which have their own weights again afterwards.
        numbers: the original number of the layer at each place.
        gone: places of the layers that go.
        solving: how their matrices are solved.
        state: what is continued from, and what is solved goes to.

    Attributes:
        room: bytes of memory for what one layer alone needs; more goes into a file of the state.
        refusal: why the last layer met, of which nothing can be solved, cannot; empty if none was.
    """

    def __init__(
        self,
        calls: LayerCalls,
        numbers: Sequence[int],
        gone: Sequence[int],
        *,
        solving: Solving,
        state: RefitState,
    ) -> None:
        self._calls, self._numbers, self._solving = calls, numbers, solving
        self.state, self.room = state, 0
        self._kept = [place for place in range(calls.count) if place not in gone]
        # the first layer whose target is not what it gives anyway
        self._start = max(min(gone) - 1, 0)
        self.refusal = ""

    @property
    def steps(self) -> int:
        """Layers of either model that a window has still to pass."""
        left = self._kept[self.state.done :]
        if not left:
            return 0
        first = left[0] if self.state.done else 0
        return self._calls.count - first + sum(place >= self._start for place in left)

    @torch.no_grad()
    def run(
        self,
        windows: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        *,
        batch_size: int = 1,
        step: Callable[[int], object] = id,
    ) -> None:
        """Reads windows of token ids; what is solved of them stands in the state.

        Args:
            windows: to fit on.
            held: to choose ridges by.
            batch_size: windows of one length read at once.
            step: called with the number of windows behind every layer of either model.

        Raises:
            NotFiniteError: a state is NaN or infinite.
        """
        if self.state.done == len(self._kept):
            self.state.finish()  # which a killed run may not have come to
            return
        groups = [[*of_one_length(part, batch_size)] for part in (windows, held)]
        batches = [tokens for group in groups for tokens in group]
        shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in batches]
        apart = [False] * len(groups[0]) + [True] * len(groups[1])
        going = Windows(self._calls, self.state, shapes, apart, self.room, step)
        try:
            self._begin(going, batches)
            self._through(going)
        finally:
            self._calls.close()
        self.state.finish()

    def _through(self, going: Windows) -> None:
        """All layers that the state has not behind it."""
        ends = [*self._kept[1:], self._calls.count]
        for place, after in [*zip(self._kept, ends, strict=True)][self.state.done :]:
            if place < self._start:
                self._move(going, [place], self.state.before("whole"))
                self.state.advance(states=("whole",))  # up to here both models are one
            else:
                self._layer(going, place, after)

    def _begin(self, windows: Windows, batches: Sequence[Tensor]) -> None:
        """Makes room for the states, and fills in those in front of the first layer that stays."""
        state = self.state
        sample = next(iter(self._calls.embed_all([batches[0][:1, :1]])))  # (1, 1, D)
        state.open(windows.shapes, sample.shape[-1], sample.dtype)
        if state.done:
            return
        whole, left = state.before("whole"), state.before("left")
        for batch, embedded in enumerate(self._calls.embed_all(batches)):
            whole[batch] = embedded
            left[batch] = embedded  # of the model whose very first layers go
        self._move(windows, range(self._kept[0]), whole, to=whole)

    def _move(
        self, windows: Windows, places: Iterable[int], source: States, *, to: States | None = None
    ) -> None:
        """Takes the whole model's states through layers, to those behind the layer at hand."""
        target = self.state.behind("whole") if to is None else to
        for place in places:
            with self._calls.loaded(place):
                for batch in windows:
                    windows.put(target, batch, windows.run(place, source[batch]), place)
            source = target

    def _layer(self, windows: Windows, place: int, after: int) -> None:
        """Takes both models from a layer that stays to the next one, and solves its matrices."""
        state = self.state
        if place == self._start > 0:
            for batch in windows:
                state.before("left")[batch] = state.before("whole")[batch]
        with self._calls.loaded(place):
            number = self._numbers[place]
            layer = LayerRefit(windows, place, number, self._solving)
            layer.teach()
        whole = state.behind("whole")
        self._move(windows, range(place + 1, after), whole, to=whole)
        if not layer.ends:
            self.refusal = layer.refused
        with self._calls.loaded(place):
            fits, values = layer.learn()
        state.advance(fits, values)


def of_one_length(windows: Sequence[Sequence[int]], size: int) -> Iterator[Tensor]:
    """Windows of one length together, (B, S) each, in the order of their first ones."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    for group in lengths.values():
        for start in range(0, len(group), size):
            yield torch.tensor([list(window) for window in group[start : start + size]])

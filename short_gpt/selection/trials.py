"""Rounds of trials: the loss of the model without each of some layers.

A trial without layer j differs from the model only behind j, so it starts from the stored state in
front of j: a round costs about half of what trials from the beginning cost, for the same losses.
The states move on layer by layer as j does. Those in front of the layer that a round removes hold
for the next round too; as many as memory allows are stored, the others computed anew.

Candidates may also be scored mended: a `Mending` changes the layer in front of every gap, so that
a trial starts there.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import check_predicted
from short_gpt.models.decoder import Decoder, padded
from short_gpt.models.numbering import runs
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.progress import Bar, bar
from short_gpt.selection.found import Nats, Options, continued
from short_gpt.selection.mending import Gap
from short_gpt.selection.stack import Stack

Batch = tuple[Tensor, Tensor]  # tokens (B, S) and mask (B, S)


class Trials:
    """Rounds of trials, with the result so far.

    Args:
        decoder: the model.
        windows: token ids.
        options: how it runs.

    Attributes:
        result: the search so far.
        groups: how many groups of windows each candidate is tried on, one after the other.

    Raises:
        ShortGPTError: no window has a token to predict, or as in `decoder.pad`.
    """

    def __init__(
        self, decoder: Decoder, windows: Sequence[Sequence[int]], options: Options
    ) -> None:
        self._decoder, self._state, self._mending = decoder, options.state, options.mending
        self._fitted: set[Gap] = set()  # as counted so far
        self._stack = Stack(decoder)
        read = read_batches(windows, decoder, options.batch_size)
        self._predicted = sum(int(mask[:, 1:].sum()) for _, mask in read)
        check_predicted(self._predicted)
        self._groups = list(self._grouped(read, options.max_memory))
        self.groups = len(self._groups)
        self._stored: dict[int, list[Tensor]] = {}  # by layer, the states (B, S, D) in front of it
        self._storing: set[int] = set()  # the same layers, had the search not been interrupted
        self._windows = len(windows)
        size = sum(self._bytes(batch) for batch in read)
        # two more are in use while the states move on
        self._room = 0 if self.groups > 1 else options.max_memory // size - 2
        self.result, self._done = continued(options.state)
        self._kept, self._rounds = len(self.result.losses), 0  # of a state; counted so far

    def shown(self, total: int, show: bool) -> Bar:
        """A bar of all trials, those that a saved search has tried before it among them."""
        tried = sum(map(len, self.result.losses)) * self.groups + sum(map(len, self._done))
        return bar("searching", total=total, unit="trial", show=show, done=tried)

    def _bytes(self, batch: Batch) -> int:
        """Of one state of a batch."""
        return batch[0].numel() * self._stack.bytes_per_token

    def _grouped(self, padded: list[Batch], max_memory: int) -> Iterator[list[Batch]]:
        """Batches whose states fit into ``max_memory``, at least one at a time."""
        group: list[Batch] = []
        used = 0
        for batch in padded:
            if group and used + self._bytes(batch) > max_memory:
                yield group
                group, used = [], 0
            group.append(batch)
            used += self._bytes(batch)
        yield group

    def round(
        self, candidates: Sequence[int], tick: Callable[[int], object], *, again: bool = False
    ) -> None:
        """Scores the candidates and removes the best, unless a saved search did so already.

        Args:
            candidates: positions, ascending.
            tick: called with 1 after every trial.
            again: whether another round follows, so that states are worth storing.

        Raises:
            NotFiniteError: a loss is NaN or infinite.
        """
        if self._rounds < self._kept:
            self._count(list(self.result.losses[self._rounds]), again=again)
            return
        try:
            self._try_all(candidates, tick, again=again)
        except BaseException:
            self._save()
            raise
        self._remove_best({i: sum(done[i] for done in self._done) for i in candidates})
        self._count(candidates, again=again)
        self._save()

    def _try_all(
        self, candidates: Sequence[int], tick: Callable[[int], object], *, again: bool
    ) -> None:
        """Tries each candidate on each group of windows, but what a saved search tried before."""
        if self._mending is not None:
            self._mending.prepare(self._gaps_of(candidates, self.result.removed))
        for number, group in enumerate(self._groups):
            while len(self._done) <= number:
                self._done.append({})
            self._try(candidates, group, self._done[number], tick, again=again)

    def _remove_best(self, nats: Nats) -> None:
        bad = [i for i, value in nats.items() if not math.isfinite(value)]
        if bad:
            raise NotFiniteError(f"the loss without layer {bad[0]} is NaN or infinite")
        best = min(nats, key=lambda i: (nats[i], i))
        # states in front of the removed layer are those of the next round too
        front = self._front(best, self.result.removed)
        self._stored = {i: states for i, states in self._stored.items() if i <= front}
        self.result.removed.append(best)
        self.result.losses.append({i: value / self._predicted for i, value in nats.items()})
        self._done = [{}]

    def _try(
        self,
        candidates: Sequence[int],
        group: list[Batch],
        done: Nats,
        tick: Callable[[int], object],
        *,
        again: bool,
    ) -> None:
        """Adds each candidate's nats on the group's windows to ``done``."""
        at, states = 0, None
        for j in candidates:
            if j in done:
                continue
            front = self._front(j, self.result.removed)
            at, states = self._nearest(at, states, front)
            states, at = self._moved(group, states, at, front), front
            if again and front not in self._stored and len(self._stored) < self._room:
                self._stored[front] = states
            done[j] = self._nats_without(j, group, states)
            tick(1)
            if self._state is not None and self._state.due():
                self._save()

    def _nearest(
        self, at: int, states: list[Tensor] | None, j: int
    ) -> tuple[int, list[Tensor] | None]:
        """The states at hand, or stored ones that are nearer in front of layer j."""
        for i in sorted(self._stored):
            if at <= i <= j:
                at, states = i, self._stored[i]
        return at, states

    def _alive(self, start: int, end: int) -> list[int]:
        return [i for i in range(start, end) if i not in self.result.removed]

    def _front(self, j: int, gone: Collection[int]) -> int:
        """The first layer that does not run alike without j: j, or what is mended in front."""
        return j if self._mending is None else max(i for i in range(j) if i not in gone)

    def _mended(self, gone: Collection[int]) -> AbstractContextManager[None]:
        """The model, mended for these layers' absence."""
        if self._mending is None:
            return nullcontext()
        return self._mending.mended(runs(gone, range(len(self._decoder.layers))))

    def _gaps_of(self, candidates: Collection[int], gone: Sequence[int]) -> set[Gap]:
        """The gaps of a round: those that there are, and those of every candidate."""
        every = range(len(self._decoder.layers))
        return {gap for j in candidates for gap in runs([*gone, j], every)} | {*runs(gone, every)}

    def _moved(
        self, group: list[Batch], states: list[Tensor] | None, at: int, j: int
    ) -> list[Tensor]:
        """The states in front of layer j, (B, S, D) each, from those in front of layer ``at``."""
        between = self._alive(at, j)
        with self._mended(self.result.removed):
            return [
                self._stack.advance(tokens, between, None if states is None else states[k])
                for k, (tokens, _) in enumerate(group)
            ]

    def _nats_without(self, j: int, group: list[Batch], states: list[Tensor]) -> float:
        """Summed loss on a group's windows without layer j, from the states at its front."""
        gone = [*self.result.removed, j]
        front = self._front(j, self.result.removed)
        rest = [i for i in self._alive(front, len(self._decoder.layers)) if i != j]
        with self._mended(gone):
            return sum(
                self._stack.nats(tokens, mask, rest, state)
                for (tokens, mask), state in zip(group, states, strict=True)
            )

    def _count(self, candidates: Sequence[int], *, again: bool) -> None:
        """Counts what a round runs from its beginning, as `_try` does; arguments as in `round`."""
        gone = self.result.removed[: self._rounds]
        alive = [i for i in range(len(self._decoder.layers)) if i not in gone]
        at = 0
        for j in candidates:
            front = self._front(j, gone)
            at = max(i for i in (at, *self._storing) if i <= front)
            self.result.evaluations += self._windows * sum(i >= at and i != j for i in alive)
            if again and len(self._storing) < self._room:
                self._storing.add(front)
            at = front
        best = self._front(self.result.removed[self._rounds], gone)
        self._storing = {i for i in self._storing if i <= best}
        self._count_fits(self._gaps_of(candidates, gone))
        self._rounds += 1

    def _count_fits(self, gaps: set[Gap]) -> None:
        if self._mending is not None:
            self.result.evaluations += self._mending.layers_run(gaps - self._fitted)
            self._fitted = gaps

    def _save(self) -> None:
        if self._state is not None:
            search = {**vars(self.result), "done": self._done}
            self._state.save({"search": search})


def read_batches(
    windows: Sequence[Sequence[int]], decoder: Decoder, batch_size: int
) -> list[Batch]:
    """Tokens and masks of windows, so many at once; errors as in `decoder.pad`."""
    return [
        (tokens, mask)
        for batch in batches(windows, batch_size)
        for _, tokens, mask in padded(batch, decoder)
    ]

"""A scoring run as a whole: batches over replicas, looks at the answer, state on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from short_gpt.data.windows import batches
from short_gpt.models.decoder import Decoder
from short_gpt.runtime import replicas
from short_gpt.scoring.clusters import merged, next_number
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.measuring import ScoreWindows, measure
from short_gpt.scoring.state import RunState
from short_gpt.scoring.stopping import Stop, Verdict, next_look

Follow = Callable[[Importance, int | None], object]


class ScoringRun:
    """Reads windows into ``into`` until they end or the answer is settled.

    Several replicas each read their batch of every step; their sums are put together at the
    looks, which all reach at the same step.

    Args:
        decoder: the model.
        into: sums to add to; their texts are others than those of the windows that are read.
        batch_size: windows that each replica reads at once.
        population: windows in all, of which those read are a random sample; None if unknown.
        stop: when to stop; None reads everything.
        state: where to save and continue; ``into`` is then its sums.
        score: as in `measuring.measure`.
        follow: is given the sums of all replicas, and the population, as they grow.

    A run that continues is given the windows of `RunState.unread`.
    """

    def __init__(
        self,
        decoder: Decoder,
        into: Importance,
        *,
        batch_size: int = 1,
        population: int | None = None,
        stop: Stop | None = None,
        state: RunState | None = None,
        score: ScoreWindows | None = None,
        follow: Follow | None = None,
    ) -> None:
        self.into = into
        self.verdict: Verdict | None = None
        self._decoder, self._batch_size, self._population = decoder, batch_size, population
        self._stop, self._state, self._score, self._follow = stop, state, score, follow
        self._team = replicas.current(decoder.device)
        self._read = into.n_windows
        # a run that continues reads the texts that its state has begun with
        self._first_text = 0 if state else next_number(into.texts)
        self._next = stop.first_look(population) if stop else 32
        step = self._team.step(batch_size) if state else 0  # it may have been saved before a look
        while self._next <= self._read - step:
            self._next = next_look(self._next)

    def read(
        self,
        windows: Iterable[Sequence[int]],
        *,
        total: int | None = None,
        progress: bool = False,
        sublayers: bool = False,
        all_tokens: bool = False,
    ) -> None:
        """Reads the windows; arguments and errors as in `measuring.measure`.

        After an error or an interruption, ``into`` and the state hold what was read before, of
        several replicas up to the last look.
        """
        alone = self._team.count == 1
        local = self.into if alone else Importance.empty(self.into.layers)
        if total is not None:
            total = max(0, total - self.into.n_windows * (self._state is not None))
            total = -(-total // self._team.count)
        try:
            measure(
                self._decoder,
                self._mine(windows),
                into=local,
                total=total,
                progress=progress,
                sublayers=sublayers,
                all_tokens=all_tokens,
                score=self._score,
                first_text=self._first_text,
                after=self._after,
            )
        except BaseException:
            if alone and self._state:
                self._state.save(self.into)
            raise
        if not (self.verdict and self.verdict.settled):
            self._look(local, final=True)
        if self._state and self._team.rank == 0:
            self._state.save(self.into)

    def _mine(self, windows: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """This replica's batches of every step; empty ones where nothing is left for it."""
        size = self._batch_size
        if self._state:
            yield []  # looks, where the run that is continued would have
        for step in batches(windows, self._team.step(size)):
            if self._state:
                self._state.note(step)
            *first, last = self._team.share(step, size)
            yield from first
            self._read += len(step)
            yield last

    def _after(self, local: Importance) -> bool:
        if self._team.count == 1:
            self._tell()
            if self._state:
                self._state.tick(local)
        if self._read < self._next:
            return False
        while self._next <= self._read:
            self._next = next_look(self._next)
        self._look(local)
        if self._state and self._team.count > 1 and self._team.rank == 0:
            self._state.save(self.into)
        return self.verdict is not None and self.verdict.settled

    def _look(self, local: Importance, *, final: bool = False) -> None:
        if self._team.count > 1:
            # in the same order of additions in a run that was interrupted at any look
            self.into = self.into.merge(sums_of_all(self._team, local))
            vars(local).update(vars(Importance.empty(local.layers)))
            self._tell()
        if self._stop:
            self.verdict = self._stop.judge(self.into, self._population, final=final)

    def _tell(self) -> None:
        if self._follow is not None:
            self._follow(self.into, self._population)


def sums_of_all(team: replicas.Replicas, local: Importance) -> Importance:
    """The sums of all replicas, those of each text included. All ranks must call it."""
    return replace(team.sum(local), texts=merged(team.gather(local.texts)))

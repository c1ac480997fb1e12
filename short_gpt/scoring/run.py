"""A scoring run as a whole: batches over replicas, looks at the answer, state on disk, remarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import islice

import torch

from short_gpt.data.windows import batches
from short_gpt.models.decoder import Decoder
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.clusters import merged, next_number
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.measuring import ScoreWindows, measure
from short_gpt.scoring.stopping import Stop, Verdict, next_look

Follow = Callable[[Importance, int | None], object]


class RunState:
    """The state of a scoring run: its sums, and a digest of the windows they are of.

    Args:
        file: where it is saved.
    """

    def __init__(self, file: StateFile) -> None:
        self.file = file
        self._texts: dict[int, str] = {}  # digest of the first windows, by their number
        self._digest = sha256()

    def sums(self, layers: Sequence[int]) -> Importance:
        """The sums to continue from: those of the file, or empty ones.

        Raises:
            ShortGPTError: the file scores other layers.
        """
        if self.file.content is None:
            return Importance.empty(layers)
        sums = Importance.from_dict(self.file.content.get("importance", {}))
        if sums.layers != list(layers):
            raise ShortGPTError(
                f"{self.file.path} scores the layers {sums.layers}, not {list(layers)}"
            )
        return sums

    def unread(self, windows: Iterable[Sequence[int]], read: int) -> Iterator[Sequence[int]]:
        """The windows that follow the first ``read``, which are compared with the file's.

        Only once they are the file's is there anything to save: a refusal leaves the file as it is.

        Raises:
            ShortGPTError: the windows are not those that the state was made of.
        """
        rest, found, count = iter(windows), self.file.content, 0
        for window in islice(rest, read):
            self._read(window)
            count += 1
        if count < read:
            raise ShortGPTError(
                f"{self.file.path} is the state of a run that has read {read} windows, now there "
                f"are {count}; take as many, delete it or name another state"
            )
        if found is not None and self._digest.hexdigest() != found.get("texts"):
            raise ShortGPTError(
                f"{self.file.path} is the state of a run on other texts or windows; delete it or "
                "name another state"
            )
        self._texts = {read: self._digest.hexdigest()}
        return rest

    def note(self, batch: Sequence[Sequence[int]]) -> None:
        """Tells of windows that are read next."""
        for window in batch:
            self._read(window)
        before = max(self._texts, default=0)
        after = before + len(batch)
        self._texts = {before: self._texts.get(before, ""), after: self._digest.hexdigest()}

    def _read(self, window: Sequence[int]) -> None:
        self._digest.update(torch.tensor([len(window), *window]).numpy().tobytes())

    def tick(self, sums: Importance) -> None:
        """Saves if it is time to."""
        if self.file.due():
            self.save(sums)

    def save(self, sums: Importance) -> None:
        """Saves the sums of the windows read so far, unless there are none."""
        texts = self._texts.get(sums.n_windows)
        if sums.n_windows and texts:
            self.file.save({"texts": texts, "importance": sums.to_dict()})


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
            total = -(-total // self._team.count)  # rounded up
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
            vars(local).update(vars(Importance.empty(local.layers)))  # counted in `into` now
            self._tell()
        if self._stop:
            self.verdict = self._stop.judge(self.into, self._population, final=final)

    def _tell(self) -> None:
        if self._follow is not None:
            self._follow(self.into, self._population)


def sums_of_all(team: replicas.Replicas, local: Importance) -> Importance:
    """The sums of all replicas, those of each text included. All ranks must call it."""
    return replace(team.sum(local), texts=merged(team.gather(local.texts)))


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

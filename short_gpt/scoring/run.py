"""A scoring run: the loop over windows, replicas, looks at the answer, state on disk, remarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from itertools import islice

import torch
from torch import Tensor

from short_gpt.data.windows import TokenIds, batches, text_number
from short_gpt.models.decoder import Decoder, pad, wait
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar, is_first_rank
from short_gpt.runtime.state import StateFile
from short_gpt.scoring import hooks
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.moments import merge_texts, next_number
from short_gpt.scoring.stopping import Stop, Verdict, next_look

ScoreBatch = Callable[[Sequence[TokenIds]], Scores]  # of the windows of a batch
NO_WINDOW = "expected at least one window of tokens, got none"
WARM_UP = 16  # tokens of a first pass, in which libraries make ready what they use


def measure(
    decoder: Decoder,
    batches: Iterable[Sequence[TokenIds]],
    *,
    into: Importance | None = None,
    total: int | None = None,
    progress: bool = False,
    score_batch: ScoreBatch | None = None,
    first_text: int | None = None,
    after: Callable[[Importance], bool] = lambda _: False,
) -> Importance:
    """Reads batches of windows and scores every layer: one pass, both papers' measures.

    Args:
        decoder: The model.
        batches: Lists of windows of token ids, of any lengths.
        into: Sums to add to and return, which name the layers. Default: new ones from layer 0.
            After an error or an interruption they have all of a batch or none of it.
        total: Number of windows to come, for the progress bar.
        score_batch: Scores the windows of a batch. Default: `hooks.score_batch`.
        first_text: Number in ``into`` of the windows' text 0. Default: the first free one, with
            which a text that is read again counts as one more, and the error is too small.
        after: Called with the sums after every batch; True ends the run.

    Raises:
        ShortGPTError: there is no window, or one is empty, too long or not in the vocabulary.
        NotFiniteError: a state is NaN or infinite; the message names the layer.

    Example:
        >>> scores = measure(short.decoder, batches(windows, 4))  # doctest: +SKIP
    """
    into = Importance.empty(range(len(decoder.layers))) if into is None else into
    layers = into.layers
    score_batch = score_batch or partial(hooks.score_batch, decoder, layers=layers)
    first_text = next_number(into.texts) if first_text is None else first_text
    begun = False
    with bar("scoring", total=total, unit="window", show=progress) as shown:
        for batch in batches:
            begun = True
            if batch:  # of several replicas, one may have nothing left
                scores = score_batch(batch)
                texts = (text_number(window) for window in batch)
                into.add(scores, [None if text is None else first_text + text for text in texts])
            shown.update(len(batch))
            if after(into):
                break
    if not begun:
        raise ShortGPTError(NO_WINDOW)
    return into


def seconds_a_pass(decoder: Decoder, windows: Sequence[TokenIds]) -> float:
    """Seconds of a pass through all layers, after a short one; all ranks of a model call it."""
    decoder.run(pad([windows[0][:WARM_UP]], decoder)[0])
    tokens, _ = pad(windows, decoder)  # (B, S)
    wait(decoder.module)
    started = time.perf_counter()
    decoder.run(tokens)
    wait(decoder.module)
    return time.perf_counter() - started


class RunState:
    """The state of a scoring run in a file: its sums, and a digest of the windows they are of."""

    def __init__(self, file: StateFile) -> None:
        self.file, self._saved = file, file.content
        self._digest, self._digests = sha256(), [""]  # of the first windows, by their number

    def agree(self, team: replicas.Replicas) -> None:
        """All ranks continue what the first one has saved. All must call it."""
        self._saved = replicas.of_model(team.gather(self.file.content)[0])[0]

    def sums(self, layers: Sequence[int]) -> Importance:
        """The sums to continue from: of the file, which must score these layers, or empty ones."""
        if self._saved is None:
            return Importance.empty(layers)
        sums = Importance.from_dict(self._saved.get("importance", {}))
        if sums.layers != list(layers):
            raise ShortGPTError(
                f"{self.file.path} scores the layers {sums.layers}, not {list(layers)}"
            )
        return sums

    def unread(self, windows: Iterable[TokenIds], read: int) -> Iterator[TokenIds]:
        """The windows that follow the first ``read``, which must be those of the file."""
        rest = iter(windows)
        self._digest, self._digests = sha256(), [""]  # also of a state that is used again
        self.note(islice(rest, read))
        other = self._saved is not None and self._digests[-1] != self._saved.get("texts")
        if len(self._digests) <= read or other:
            raise ShortGPTError(
                f"{self.file.path} is the state of a run on {read} other windows; delete it or "
                "name another state"
            )
        return rest

    def note(self, windows: Iterable[TokenIds]) -> None:
        """Notes windows that are read next, which the state then covers."""
        for window in windows:
            self._digest.update(torch.tensor([len(window), *window]).numpy().tobytes())
            self._digests.append(self._digest.hexdigest())

    def save(self, sums: Importance) -> None:
        """Saves the sums; of several ranks the first does, which holds the lock."""
        if 0 < sums.n_windows < len(self._digests) and is_first_rank():
            texts = self._digests[sums.n_windows]
            self.file.save({"texts": texts, "importance": sums.to_dict()})


class ScoringRun:
    """Reads windows into ``into`` until they end or the answer is settled.

    Several replicas each read their batch of every step; their sums are added up at the looks.

    Args:
        into: Sums to add to; their texts are others than those of the windows that are read.
        batch_size: Windows that each replica reads at once.
        population: Windows in all, of which those read are a random sample; None if unknown.
        stop: When to stop. Default: after all windows.
        state: Where to save and continue; ``into`` is then its sums, as in `RunState.unread`.
        score_batch: As in `measure`.
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
        score_batch: ScoreBatch | None = None,
    ) -> None:
        self.into = into
        self.verdict: Verdict | None = None
        self._decoder, self._batch_size, self._population = decoder, batch_size, population
        self._stop, self._state, self._score_batch = stop, state, score_batch
        self._team = replicas.current(decoder.device)
        self._read = into.n_windows
        # a run that continues reads the texts that its state has begun with
        self._first_text = 0 if state else next_number(into.texts)
        self._next = stop.first_look(population) if stop else 32
        step = self._team.step(batch_size) if state else 0  # it may have been saved before a look
        while self._next <= self._read - step:
            self._next = next_look(self._next)

    def read(
        self, windows: Iterable[TokenIds], *, total: int | None = None, progress: bool = False
    ) -> None:
        """Reads the windows; arguments and errors as in `measure`.

        After an error, ``into`` and the state hold what was read before, of several replicas up to
        the last look.
        """
        alone = self._team.count == 1
        local = self.into if alone else Importance.empty(self.into.layers)
        if total is not None:
            total = max(0, total - self.into.n_windows * (self._state is not None))
            total = -(-total // self._team.count)  # rounded up

        try:
            measure(
                self._decoder,
                self._own_batches(windows),
                into=local,
                total=total,
                progress=progress,
                score_batch=self._score_batch,
                first_text=self._first_text,
                after=self._after,
            )
        except BaseException:
            if alone and self._state:
                self._state.save(self.into)
            raise
        if not self._read:  # nothing before, and nothing now
            raise ShortGPTError(NO_WINDOW)
        if not (self.verdict and self.verdict.settled):
            self._look(local, final=True)
        if self._state:
            self._state.save(self.into)

    def _own_batches(self, windows: Iterable[TokenIds]) -> Iterator[list[TokenIds]]:
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
        if self._team.count == 1 and self._state and self._state.file.due():
            self._state.save(local)
        if self._read < self._next:
            return False
        while self._next <= self._read:
            self._next = next_look(self._next)
        self._look(local)
        if self._state and self._team.count > 1:
            self._state.save(self.into)
        return self.verdict is not None and self.verdict.settled

    def _look(self, local: Importance, *, final: bool = False) -> None:
        if self._team.count > 1:
            # in the same order of additions in a run that was interrupted at any look
            self.into = self.into.merge(sums_of_all(self._team, local))
            vars(local).update(vars(Importance.empty(local.layers)))  # counted in `into` now
        if self._stop:
            self.verdict = self._stop.judge(self.into, self._population, final=final)


def sums_of_all(team: replicas.Replicas, local: Importance) -> Importance:
    """The sums of all replicas, and of each text. All ranks must call it."""
    names = [f.name for f in fields(local) if isinstance(getattr(local, f.name), Tensor)]
    sums = [getattr(local, name) for name in names]  # float64
    flat = team.summed(torch.cat([values.flatten() for values in sums]))  # in one message
    parts = flat.split([values.numel() for values in sums])
    total = {n: part.view_as(old) for n, part, old in zip(names, parts, sums, strict=True)}
    return replace(local, **total, texts=merge_texts(team.gather(local.texts)))

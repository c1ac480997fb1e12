"""Layers chosen by the loss of the model without them: one-shot, or greedily (SLEB).

A trial without layer j differs from the model only from j on, so it starts from the stored hidden
state entering j: a round costs about half of what trials from the beginning cost, for the same
losses. States before the layer that a round removes hold for the next round too; as many as memory
allows are stored. If it does not hold one for all windows, every trial runs from the beginning.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from short_gpt.data.windows import TokenIds, batches, evaluated
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import check_predicted, divergence, measured
from short_gpt.models.decoder import Decoder, padded
from short_gpt.models.layer_calls import PartialRun
from short_gpt.models.numbering import check_count
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError, check
from short_gpt.runtime.memory import free_memory
from short_gpt.runtime.progress import Bar, bar
from short_gpt.runtime.state import StateFile
from short_gpt.selection.methods import KLD, SEARCHED

Batch = tuple[list[TokenIds], Tensor, Tensor]  # windows, tokens (B, S), mask (B, S)
Nats = dict[int, float]  # by candidate


@dataclass
class Search:
    """The result of a search."""

    removed: list[int] = field(default_factory=list)  # positions, in order of removal
    # of every round, the mean loss in nats per token without each candidate
    losses: list[dict[int, float]] = field(default_factory=list)

    @property
    def steps(self) -> list[tuple[int, float]]:
        """The removed layers, each with its loss in its round, or in the only one."""
        last = len(self.losses) - 1
        return [(layer, self.losses[min(i, last)][layer]) for i, layer in enumerate(self.removed)]


@dataclass(frozen=True)
class SearchOptions:
    """How a search by loss runs.

    Attributes:
        batch_size: Windows read together.
        max_memory: Bytes for stored states.
        state: Saves the search and continues it; that of another search is refused.
        progress: Show a bar.
        start: The same search of fewer layers, to go on with.
    """

    batch_size: int = 1
    max_memory: int = 2**31
    state: StateFile | None = None
    progress: bool = False
    start: Search | None = None


def by_loss(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    options: SearchOptions,
    *,
    method: str,
) -> Search:
    """The search of a name in `methods.SEARCHED`; ShortGPTError for another name.

    "sleb" removes greedily the layer whose absence costs least, n times (SLEB, arXiv:2402.09025):
    every round scores all remaining layers on the model as pruned so far, except the first and the
    last; ties go to the lower layer. "greedy_kld" is the same by the KL divergence from the model
    as it is now, in place of the loss of the next token. "perplexity" takes the n layers without
    which, each alone, the loss is lowest (Shortened LLaMA): every layer is a candidate.

    Args:
        windows: Token ids; all are read once for every candidate of every round.
        n: Layers to remove, 1 to L - 2, and by "perplexity" to L - 1.
    """
    check(method in SEARCHED, "method", method, f"one of {', '.join(SEARCHED)}")
    count, one_shot = len(decoder.layers), method == "perplexity"
    candidates = [*range(count)] if one_shot else [*range(1, count - 1)]
    n = check_count(n, count, most=None if one_shot else len(candidates))
    about = {"method": method} | ({} if one_shot else {"candidates": candidates})
    trials = Trials(decoder, windows, options, about)
    rounds = 1 if one_shot else n
    total = sum(len(candidates) - i for i in range(rounds))
    with trials.progress_bar(total, options.progress) as shown:
        for number in range(len(trials.result.losses), rounds):  # a saved search had some rounds
            left = [i for i in candidates if i not in trials.result.removed]
            trials.round(left, shown.update, again=number < rounds - 1)
    found = trials.result  # a saved search may have more layers
    if one_shot:
        loss = found.losses[0]
        return Search(sorted(loss, key=lambda i: (loss[i], i))[:n], found.losses)
    return Search(found.removed[:n], found.losses[:n])


def most_layers_run(count: int, n: int) -> int:
    """The most layers, of so many, that a window runs through in a greedy search."""
    tried = [alive - 2 for alive in range(count, count - n, -1)]  # in every round
    # the layers after each candidate, and the candidates, through which the states advance
    return sum(trials * (trials + 1) // 2 + trials for trials in tried)


class Trials:
    """Rounds of trials: ``result`` is the search so far.

    ``identity`` tells the search from others on the same model, layers and windows.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Sequence[Sequence[int]],
        options: SearchOptions,
        identity: Mapping[str, object],
    ) -> None:
        self._layers, self._state = range(len(decoder.layers)), options.state
        self._run = PartialRun(decoder)
        self._reference = Reference(decoder) if identity["method"] == KLD else None
        self._batches: list[Batch] = [
            ([batch[i] for i in indices], tokens, mask)
            for batch in batches(windows, options.batch_size)
            for indices, tokens, mask in padded(batch, decoder)
        ]
        if self._reference is not None:
            self._reference.read(windows)
        self._predicted = sum(sum(evaluated(window)) for window in windows)
        check_predicted(self._predicted)
        self._stored: dict[int, list[Tensor]] = {}  # by layer, the states (B, S, D) entering it
        tokens_read = sum(tokens.numel() for _, tokens, _ in self._batches)
        size = tokens_read * self._run.bytes_per_token  # of one state of all windows
        # two more are in use while the states advance
        self._fits, self._room = size <= options.max_memory, options.max_memory // size - 2
        if self._reference is not None and decoder.device.type == "cpu":  # others' heads are fast
            rest = options.max_memory - (len(self._layers) + 2) * size
            self._reference.room = max(0, min(rest, free_memory() // 2))
        read_on = {"layers": len(self._layers), "windows": windows_digest(windows)}
        self._identity = {**identity, **read_on}
        self.result, self._done = continued(options.state, self._identity)
        if options.start and not self.result.removed:
            self.result = Search([*options.start.removed], [*options.start.losses])
            self._done = {}  # what a saved search tried is of an earlier round

    def progress_bar(self, total: int, show: bool) -> Bar:
        """A bar of all trials, starting with those of a continued search."""
        tried = sum(map(len, self.result.losses)) + len(self._done)
        return bar("searching", total=total, unit="trial", show=show, done=tried)

    def round(
        self, candidates: Sequence[int], tick: Callable[[int], object], *, again: bool = False
    ) -> None:
        """Scores candidates (ascending) and removes the best.

        ``tick`` gets 1 after every trial; ``again``: another round follows, so states are stored.
        """
        try:
            self._try(candidates, tick, again=again)
        except BaseException:
            self._save()
            raise
        self._remove_best({i: self._done[i] for i in candidates})
        self._save()

    def _remove_best(self, nats: Nats) -> None:
        bad = [i for i, value in nats.items() if not math.isfinite(value)]
        if bad:
            raise NotFiniteError(f"the loss without layer {bad[0]} is NaN or infinite")
        best = min(nats, key=lambda i: (nats[i], i))
        # states entering layers up to the removed one are those of the next round too
        self._stored = {i: states for i, states in self._stored.items() if i <= best}
        self.result.removed.append(best)
        self.result.losses.append({i: value / self._predicted for i, value in nats.items()})
        self._done = {}

    def _try(
        self, candidates: Sequence[int], tick: Callable[[int], object], *, again: bool
    ) -> None:
        """Notes the nats without each candidate, unless they are known."""
        # the layer that the present states (B, S, D) enter; None: the embeddings
        at, states = 0, cast("Sequence[Tensor | None]", [None] * len(self._batches))
        for j in candidates:
            if j in self._done:
                continue
            for i in sorted(self._stored):  # a stored state may be nearer than the present one
                if at <= i <= j:
                    at, states = i, self._stored[i]
            between, rest = self._alive(at, j), self._alive(j + 1)
            nats, entering = 0.0, list[Tensor]()
            for batch, state in zip(self._batches, states, strict=True):
                entered = self._run.advance(batch[1], between, state)
                nats += self._loss(batch, rest, entered)
                entering += [entered] * self._fits
            self._done[j] = nats
            if self._fits:
                at, states = j, entering
                if again and j not in self._stored and len(self._stored) < self._room:
                    self._stored[j] = entering
            tick(1)
            if self._state is not None and self._state.due():
                self._save()

    def _loss(self, batch: Batch, run: Sequence[int], state: Tensor | None) -> float:
        """The batch's loss in nats, summed, with only the layers ``run`` after ``state``."""
        windows, tokens, mask = batch
        logits = self._run.logits(tokens, run, state)  # (B, S, V)
        if self._reference is not None:
            return divergence(windows, logits, mask, self._reference)
        return sum(s.nats for s in measured(windows, logits, tokens, mask))

    def _alive(self, start: int, end: int | None = None) -> list[int]:
        return [i for i in self._layers[start:end] if i not in self.result.removed]

    def _save(self) -> None:
        if self._state is not None:
            now = {"tried": self._done, **self._identity}
            self._state.save({"search": {**vars(self.result), **now}})


def continued(state: StateFile | None, identity: Mapping[str, object]) -> tuple[Search, Nats]:
    """The search in a state, and the nats of its unfinished round; new ones if none.

    ShortGPTError if the state is not of a search with this identity.
    """
    if state is None or not state.content:
        return Search(), {}
    content = state.content.get("search", {})
    if other := [name for name, value in identity.items() if content.get(name) != value]:
        raise ShortGPTError(
            f"{state.path} is the state of another search (it differs in {', '.join(other)}); go "
            "on with the former, delete it or name another state"
        )
    *losses, tried = (  # by layers, whose numbers JSON has turned into strings
        {int(i): value for i, value in by_layer.items()}
        for by_layer in (*content["losses"], content.get("tried", {}))
    )
    return Search(list(content["removed"]), losses), tried

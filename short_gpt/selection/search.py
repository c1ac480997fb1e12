"""Layers chosen by the loss of the model without them: one-shot, or greedily (SLEB).

A trial without layer j differs from the model only behind j, so it starts from the stored state in
front of j: a round costs about half of what trials from the beginning cost, for the same losses.
The states move on layer by layer as j does. Those in front of the layer that a round removes hold
for the next round too; as many as memory allows are stored, the others computed anew.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import batch_nats
from short_gpt.models.decoder import Decoder, pad
from short_gpt.models.layer_hooks import output_form, patched_forward
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile


@dataclass
class Search:
    """What a search found.

    Attributes:
        removed: positions of the layers, in order of removal.
        losses: for every round, the mean loss in nats per token without each candidate.
        evaluations: layers run, each on one window.
    """

    removed: list[int] = field(default_factory=list)
    losses: list[dict[int, float]] = field(default_factory=list)
    evaluations: int = 0


def sleb(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    *,
    candidates: Collection[int] | None = None,
    batch_size: int = 1,
    max_memory: int = 2**31,
    state: StateFile | None = None,
    progress: bool = False,
) -> Search:
    """Removes greedily the layer whose absence costs least, n times (SLEB, arXiv:2402.09025).

    Every round scores all layers left on the model as pruned so far. The first and the last layer
    left are never candidates; ties go to the lower layer.

    Args:
        decoder: the model; it is left as it was.
        windows: token ids; all are read once for every candidate of every round.
        n: how many layers, 1 to L - 2.
        candidates: positions that may be removed; None takes all.
        batch_size: windows read at once.
        max_memory: bytes for stored states. Windows that need more even for one state each are
            read in groups, one after the other.
        state: saves the search and continues it.
        progress: whether to show a bar.

    Raises:
        ShortGPTError: n is out of range, or as in `decoder.pad`.
        NotFiniteError: a loss is NaN or infinite.
    """
    *_, found = sleb_rounds(
        decoder,
        windows,
        n,
        candidates=candidates,
        batch_size=batch_size,
        max_memory=max_memory,
        state=state,
        progress=progress,
    )
    return found


def sleb_rounds(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    *,
    candidates: Collection[int] | None = None,
    batch_size: int = 1,
    max_memory: int = 2**31,
    state: StateFile | None = None,
    progress: bool = False,
) -> Iterator[Search]:
    """The same search, n times: what was found so far after every round. As in `sleb`."""
    count = len(decoder.layers)
    allowed = set(range(count)) if candidates is None else set(candidates)
    possible = len(allowed & set(range(1, count - 1)))
    if not 1 <= n <= possible:
        raise ShortGPTError(
            f"n = {n} layers to remove; {possible} of {count} may go (never the first or last)"
        )
    trials = _Trials(decoder, windows, batch_size, max_memory, state)
    rounds = [len(allowed & set(range(1, count - 1))) - i for i in range(n)]
    with bar("searching", total=sum(rounds) * trials.groups, unit="trial", show=progress) as shown:
        for left in reversed(range(n)):
            alive = [i for i in range(count) if i not in trials.found.removed]
            trials.round([i for i in alive[1:-1] if i in allowed], shown.update, again=left > 0)
            yield trials.found


def one_shot(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    *,
    batch_size: int = 1,
    max_memory: int = 2**31,
    state: StateFile | None = None,
    progress: bool = False,
) -> Search:
    """The n layers without which, each alone, the loss is lowest (Shortened LLaMA, by perplexity).

    Arguments and errors as in `sleb`; every layer is a candidate, n is 1 to L - 1.
    """
    count = len(decoder.layers)
    if not 1 <= n < count:
        raise ShortGPTError(f"n = {n} layers to remove of {count}: expected 1 to {count - 1}")
    trials = _Trials(decoder, windows, batch_size, max_memory, state)
    with bar("searching", total=count * trials.groups, unit="trial", show=progress) as shown:
        trials.round(range(count), shown.update)
    loss = trials.found.losses[0]
    trials.found.removed = sorted(loss, key=lambda i: (loss[i], i))[:n]
    return trials.found


class _Trials:
    """Rounds of trials, with what was found so far."""

    def __init__(
        self,
        decoder: Decoder,
        windows: Sequence[Sequence[int]],
        batch_size: int,
        max_memory: int,
        state: StateFile | None,
    ) -> None:
        self.found = Search()
        self._done: list[dict[int, float]] = [{}]  # by group, nats without each candidate
        self._decoder, self._state = decoder, state
        self._stack = Stack(decoder)
        padded = [pad(batch, decoder) for batch in batches(windows, batch_size)]
        self._predicted = sum(int(mask[:, 1:].sum()) for _, mask in padded)
        if not self._predicted:
            raise ShortGPTError("expected windows of at least 2 tokens; nothing was predicted")
        self._groups = list(self._grouped(padded, max_memory))
        self.groups = len(self._groups)
        self._stored: dict[int, list[Tensor]] = {}  # by layer, the states in front of it
        size = sum(tokens.numel() for tokens, _ in padded) * self._stack.bytes_per_token
        # two more are in use while the states move on
        self._room = 0 if self.groups > 1 else max_memory // size - 2
        if state is not None and state.content:
            content = state.content["search"]
            losses = [{int(i): v for i, v in r.items()} for r in content["losses"]]
            self.found = Search(content["removed"], losses, content["evaluations"])
            self._done = [{int(i): v for i, v in g.items()} for g in content["done"]]
        self._rounds_kept = len(self.found.losses)

    def _grouped(
        self, padded: list[tuple[Tensor, Tensor]], max_memory: int
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Batches whose states fit into ``max_memory``, at least one at a time."""
        group: list[tuple[Tensor, Tensor]] = []
        used = 0
        for tokens, mask in padded:
            size = tokens.numel() * self._stack.bytes_per_token
            if group and used + size > max_memory:
                yield group
                group, used = [], 0
            group.append((tokens, mask))
            used += size
        yield group

    def round(
        self, candidates: Sequence[int], tick: Callable[[int], object], *, again: bool = False
    ) -> None:
        """Scores the candidates and removes the best, unless a saved search did so already.

        Args:
            candidates: positions, ascending.
            tick: called with 1 after every trial.
            again: whether another round follows, so that states are worth storing.
        """
        if self._rounds_kept:
            self._rounds_kept -= 1
            return
        try:
            for number, group in enumerate(self._groups):
                while len(self._done) <= number:
                    self._done.append({})
                self._try(candidates, group, self._done[number], tick, again)
        except BaseException:
            self._save()
            raise
        nats = {i: sum(done[i] for done in self._done) for i in candidates}
        bad = [i for i in candidates if not math.isfinite(nats[i])]
        if bad:
            raise NotFiniteError(f"the loss without layer {bad[0]} is NaN or infinite")
        best = min(candidates, key=lambda i: (nats[i], i))
        self._stored = {i: states for i, states in self._stored.items() if i <= best}
        self.found.removed.append(best)
        self.found.losses.append({i: value / self._predicted for i, value in nats.items()})
        self._done = [{}]
        self._save()

    def _try(
        self,
        candidates: Sequence[int],
        group: list[tuple[Tensor, Tensor]],
        done: dict[int, float],
        tick: Callable[[int], object],
        again: bool,
    ) -> None:
        """Adds each candidate's nats on the group's windows to ``done``."""
        removed, count = set(self.found.removed), len(self._decoder.layers)
        states: list[Tensor] | None = None
        at = 0
        windows = sum(len(tokens) for tokens, _ in group)
        for j in candidates:
            if j in done:
                continue
            for i in sorted(self._stored):
                if at <= i <= j:
                    at, states = i, self._stored[i]
            between = [i for i in range(at, j) if i not in removed]
            states = [
                self._stack.advance(tokens, between, None if states is None else states[k])
                for k, (tokens, _) in enumerate(group)
            ]
            if again and j not in self._stored and len(self._stored) < self._room:
                self._stored[j] = states
            at, rest = j, [i for i in range(j + 1, count) if i not in removed]
            done[j] = sum(
                self._stack.nats(tokens, mask, rest, state)
                for (tokens, mask), state in zip(group, states, strict=True)
            )
            self.found.evaluations += (len(between) + len(rest)) * windows
            tick(1)
            if self._state is not None and self._state.due():
                self._save()

    def _save(self) -> None:
        if self._state is not None:
            search = {**vars(self.found), "done": self._done}
            self._state.save({"search": search})


class Stack:
    """A decoder's layers, run from a stored state or only in part.

    Layers that are not to run hand on what they are given; nothing is taken out of the model, so
    that positions, masks and settings of the other layers stay theirs.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        state, self._form = output_form(decoder)
        self.bytes_per_token = state.numel() * state.element_size()

    def advance(self, tokens: Tensor, run: Sequence[int], state: Tensor | None) -> Tensor:
        """The state (B, S, D) behind the layers ``run``, from that in front of them.

        Args:
            tokens: (B, S).
            run: positions, ascending; none gives ``state`` back.
            state: in front of the first of them; None starts from the embeddings.
        """
        if not run and state is not None:
            return state
        kept: list[Tensor] = []
        with self._only(run, state, kept):
            self._decoder.run(tokens)
        return kept[-1]

    def nats(self, tokens: Tensor, mask: Tensor, run: Sequence[int], state: Tensor) -> float:
        """Summed loss of the predicted tokens, with only the layers ``run`` behind ``state``."""
        with self._only(run, state, None):
            return batch_nats(self._decoder, tokens, mask)

    @contextmanager
    def _only(
        self, run: Sequence[int], state: Tensor | None, kept: list[Tensor] | None
    ) -> Iterator[None]:
        """The model with only some layers running, the first of which meets ``state``."""
        layers, first = self._decoder.layers, min(run, default=len(self._decoder.layers) - 1)
        with ExitStack() as stack:
            for i, layer in enumerate(layers):
                if i not in run:
                    replacement = state if i == first else None
                    stack.enter_context(patched_forward(layer, self._passing(replacement)))
            if state is not None and run:
                handle = layers[first].register_forward_pre_hook(_meeting(state), with_kwargs=True)
                stack.callback(handle.remove)
            if kept is not None:
                hook = layers[max(run, default=0)].register_forward_hook(_keeping(kept))
                stack.callback(hook.remove)
            yield

    def _passing(self, state: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return self._form(given if state is None else state)

        return forward


def _meeting(state: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    return hook


def _keeping(kept: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple | list) else output)

    return hook

"""Layers chosen by the loss of the model without them: one-shot, or greedily (SLEB).

How a trial starts from a stored state is told in `trials`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from short_gpt.models.decoder import Decoder
from short_gpt.models.numbering import check_count
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile
from short_gpt.selection.trials import Limits, Search, Trials

__all__ = ["Search", "one_shot", "sleb", "sleb_rounds"]


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
    *_, result = sleb_rounds(
        decoder,
        windows,
        n,
        candidates=candidates,
        batch_size=batch_size,
        max_memory=max_memory,
        state=state,
        progress=progress,
    )
    return result


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
    """The same search, n times: the result so far after every round. As in `sleb`."""
    count = len(decoder.layers)
    allowed = set(range(1, count - 1)) & set(range(count) if candidates is None else candidates)
    check_count(n, count, most=len(allowed))
    trials = Trials(decoder, windows, Limits(batch_size, max_memory), state)
    total = sum(len(allowed) - i for i in range(n)) * trials.groups
    with bar("searching", total=total, unit="trial", show=progress) as shown:
        for left in reversed(range(n)):
            alive = [i for i in range(count) if i not in trials.result.removed]
            trials.round([i for i in alive[1:-1] if i in allowed], shown.update, again=left > 0)
            yield trials.result


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
    check_count(n, count)
    trials = Trials(decoder, windows, Limits(batch_size, max_memory), state)
    with bar("searching", total=count * trials.groups, unit="trial", show=progress) as shown:
        trials.round(range(count), shown.update)
    loss = trials.result.losses[0]
    trials.result.removed = sorted(loss, key=lambda i: (loss[i], i))[:n]
    return trials.result

"""Layers chosen by the loss of the model without them: one-shot, or greedily (SLEB).

How a trial starts from a stored state is told in `trials`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from short_gpt.models.decoder import Decoder
from short_gpt.models.numbering import check_count
from short_gpt.runtime.state import StateFile
from short_gpt.selection.evolved import evolution
from short_gpt.selection.found import Options, Search
from short_gpt.selection.mending import Mending
from short_gpt.selection.methods import GREEDY, check_by_loss
from short_gpt.selection.trials import Trials

__all__ = ["Search", "by_loss", "one_shot", "sleb", "sleb_rounds"]

DEFAULT = Options()


def by_loss(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    options: Options,
    *,
    method: str,
    budget: float = 1.0,
    seed: int = 0,
) -> Search:
    """The search of a name in `methods.BY_LOSS`; ``budget`` and ``seed`` are for evolution.

    Raises:
        ShortGPTError: the method is unknown, or it is "sleb_healed" and nothing heals.
    """
    check_by_loss(method, healed=options.mending is not None)
    if method in GREEDY:
        return _last(_rounds(decoder, windows, n, options))
    if method == "evolution":
        return evolution(decoder, windows, n, options, budget=budget, seed=seed)
    return _one_shot(decoder, windows, n, options)


def sleb(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    n: int,
    *,
    candidates: Collection[int] | None = None,
    batch_size: int = 1,
    max_memory: int = 2**31,
    state: StateFile | None = None,
    mending: Mending | None = None,
    progress: bool = False,
) -> Search:
    """Removes greedily the layer whose absence costs least, n times (SLEB, arXiv:2402.09025).

    Every round scores all layers left on the model as pruned so far. The first and the last layer
    left are never candidates; ties go to the lower layer.

    Args:
        decoder: the model; it is left as it was.
        windows: token ids; all are read once for every candidate of every round.
        n: how many layers, 1 to L - 2.
        candidates, batch_size, max_memory, state, progress: as `found.Options`.
        mending: scores models as healed, so that the search removes what costs least then; see
            `healing.gap_refit`.

    Raises:
        ShortGPTError: n is out of range, or as in `decoder.pad`.
        NotFiniteError: a loss is NaN or infinite.
    """
    options = Options(candidates, batch_size, max_memory, state, mending, progress)
    return _last(_rounds(decoder, windows, n, options))


def sleb_rounds(
    decoder: Decoder, windows: Sequence[Sequence[int]], n: int, options: Options = DEFAULT
) -> Iterator[Search]:
    """The same search, n times: the result so far after every round. As in `sleb`."""
    return _rounds(decoder, windows, n, options)


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
    options = Options(None, batch_size, max_memory, state, None, progress)
    return _one_shot(decoder, windows, n, options)


def _rounds(
    decoder: Decoder, windows: Sequence[Sequence[int]], n: int, options: Options
) -> Iterator[Search]:
    count = len(decoder.layers)
    allowed = options.allowed(count)
    check_count(n, count, most=len(allowed))
    trials = Trials(decoder, windows, options)
    total = sum(len(allowed) - i for i in range(n)) * trials.groups
    with trials.shown(total, options.progress) as shown:
        for left in reversed(range(n)):
            alive = [i for i in range(count) if i not in trials.result.removed]
            trials.round([i for i in alive[1:-1] if i in allowed], shown.update, again=left > 0)
            yield trials.result


def _last(rounds: Iterator[Search]) -> Search:
    *_, result = rounds
    return result


def _one_shot(
    decoder: Decoder, windows: Sequence[Sequence[int]], n: int, options: Options
) -> Search:
    count = len(decoder.layers)
    check_count(n, count)
    trials = Trials(decoder, windows, options)
    with trials.shown(count * trials.groups, options.progress) as shown:
        trials.round(range(count), shown.update)
    loss = trials.result.losses[0]
    trials.result.removed = sorted(loss, key=lambda i: (loss[i], i))[:n]
    return trials.result

"""The greedy search whose candidates are scored as healed."""

from __future__ import annotations

from collections.abc import Sequence

from llama.parallel import model_parallel_size
from short_gpt.healing.gap_refit import GapRefits
from short_gpt.healing.refit import held_apart
from short_gpt.models.decoder import pad
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.selection.search import Search
from short_gpt.wrappers.short_model import ShortModel

Windows = Sequence[Sequence[int]]
SCORED_EVERY = 4  # every fourth window scores candidates, the others are fitted on


def search_healed(
    short: ShortModel,
    windows: Windows,
    n: int,
    *,
    fitted_on: Windows | None = None,
    candidates: Sequence[int] | None = None,
    batch_size: int = 1,
    max_memory: int = 2**31,
    state: StateFile | None = None,
    progress: bool = True,
) -> Search:
    """Removes greedily the layer whose absence costs least once the gap is refitted.

    In every trial the last matrix of the MLP in front of each gap is that of `gap_refit`, which
    takes one pass over the windows to fit on in every round. What is removed is to be refitted
    afterwards, as by `heal_refit`: as cut, other layers cost less.

    Args:
        short: the model; it is left as it was.
        windows: token ids that candidates are scored on.
        n: how many layers, 1 to L - 2.
        fitted_on: windows to fit on, other ones; None takes every fourth of ``windows`` to score
            candidates and fits on the rest.
        candidates: original numbers of the layers that may be removed; None for all.
        batch_size, max_memory, state, progress: as in `selection.search.sleb`.

    Returns:
        As of `selection.search.sleb`, the losses those of the models so refitted.

    Raises:
        ShortGPTError: fewer than two windows to fit on; no matrix ends a layer's MLP whose output
            is added to the stream; several model-parallel ranks; or as in `selection.search.sleb`.
        NotFiniteError: a weight, a state or a loss is NaN or infinite.

    Example:
        >>> found = search_healed(short, windows, 4)  # doctest: +SKIP
        >>> refit = heal_refit(short, found.removed, windows)  # doctest: +SKIP
    """
    scored, mending = _prepared(short, windows, fitted_on, batch_size)
    return short.search(
        scored,
        n,
        method="sleb_healed",
        candidates=candidates,
        batch_size=batch_size,
        max_memory=max_memory,
        state=state,
        mending=mending,
        progress=progress,
    )


def _prepared(
    short: ShortModel, windows: Windows, fitted_on: Windows | None, batch_size: int
) -> tuple[Windows, GapRefits]:
    """The windows that candidates are scored on, and what refits on the others."""
    if model_parallel_size() > 1:
        raise ShortGPTError(
            f"a search as healed needs the whole model on one rank, got {model_parallel_size()} "
            "model-parallel ranks; convert the checkpoint, which merges its shards"
        )
    short.check_whole()
    if fitted_on is None:
        scored = windows[::SCORED_EVERY]
        fitted_on = [w for i, w in enumerate(windows) if i % SCORED_EVERY]
    else:
        scored = windows
    if len(fitted_on) < 2:
        raise ShortGPTError(
            f"expected at least 2 windows to refit on beside those that candidates are scored on, "
            f"got {len(fitted_on)}: give more windows"
        )
    for window in fitted_on:
        pad([window], short.decoder)  # refuses what the model cannot read, before any work
    return scored, GapRefits(short.decoder, *held_apart(list(fitted_on)), batch_size=batch_size)

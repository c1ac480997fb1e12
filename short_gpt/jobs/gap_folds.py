"""What mends gaps, fitted for many sets of layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from short_gpt.healing import PatchSettings, refit
from short_gpt.jobs import peer_maps
from short_gpt.jobs.rows import PATCHED, Windows
from short_gpt.wrappers.short_model import ShortModel

Fold = Callable[[], Callable[[], None]]  # changes the model as it is cut, and gives the undo


def gap_folds(
    healing: str,
    short: ShortModel,
    sets: Sequence[list[int]],
    windows: Windows,
    *,
    progress: bool = True,
) -> list[Fold]:
    """What changes the model without each of the sets, in their order.

    Args:
        healing: of `rows.IN_FRONT`.
        short: with all its layers.
        sets: original numbers of the layers that go.
        windows: to fit on, one pass for all sets.
        progress: whether to show a bar.
    """
    if healing == PATCHED:
        how = PatchSettings()
        patches = [refit.fit(short, s, windows, settings=how, progress=progress) for s in sets]
        return [partial(refit.fold, short, patch) for patch in patches]
    maps = peer_maps.fit_many(short, healing, sets, windows, progress=progress)
    return [partial(peer_maps.apply, short, found) for found in maps]

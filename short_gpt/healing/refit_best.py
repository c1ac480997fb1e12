"""The refit of the settings that have the least loss on windows kept apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from short_gpt.evaluation.paired import together
from short_gpt.healing.refit import Refit, fit, fold, held_apart
from short_gpt.healing.solving import PARTS, RIDGES, WEIGHTS, Solving
from short_gpt.wrappers.scored_model import ScoredModel

AIMS = (1.0, 0.7, 0.5)
TRIED = len(WEIGHTS) + len(AIMS) - 1 + len(PARTS)  # fits


def fit_best(
    short: ScoredModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    *,
    held: Sequence[Sequence[int]] | None = None,
    ridges: Sequence[float] = RIDGES,
    batch_size: int = 1,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Refit:
    """Fits in several ways, and keeps what has the least loss on windows kept apart.

    Tried are both halves with each weight of tokens, then with each aim, then each half alone,
    every time with what was best before. It takes six times as long as `fit`, whose args and
    errors it has; the model is as it was afterwards.

    Example:
        >>> fit_best(short, [21], windows).tried  # doctest: +SKIP
        {'none': 61.2, 'attention,mlp inverse 1': 23.4, 'attention,mlp equal 1': 24.0, ...}
    """
    windows, held = held_apart(list(windows)) if held is None else (windows, held)

    def loss(refit: Refit) -> float:
        return tried[refit.solving.name]

    def fitted(solving: Solving) -> Refit:
        folder = solving.name.replace(" ", "-").replace(",", "-")
        refit = fit(
            short,
            layers,
            windows,
            held=held,
            **vars(solving),
            batch_size=batch_size,
            work_dir=None if work_dir is None else Path(os.fspath(work_dir)) / folder,
            progress=progress,
        )
        with short.without_layers(layers):
            tried[solving.name] = _perplexity_with(short, refit, held)
        return refit

    with short.without_layers(layers):
        tried = {"none": _perplexity(short, held)}
    best = min((fitted(Solving(PARTS, ridges, weights)) for weights in WEIGHTS), key=loss)
    found = best.solving
    others = (fitted(replace(found, aim=aim)) for aim in AIMS if aim != found.aim)
    best = min(chain([best], others), key=loss)
    if {fit.part for fit in best.fits} == set(PARTS):
        found = best.solving
        alone = (fitted(replace(found, parts=(part,))) for part in PARTS)
        best = min(chain([best], alone), key=loss)
    return replace(best, tried=tried)


def _perplexity_with(short: ScoredModel, refit: Refit, held: Sequence[Sequence[int]]) -> float:
    undo = fold(short, refit)
    try:
        return _perplexity(short, held)
    finally:
        undo()


def _perplexity(short: ScoredModel, held: Sequence[Sequence[int]]) -> float:
    return together(short.window_losses(held, progress=False)).value

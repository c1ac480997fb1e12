"""The refit of the token weights and halves that have the least loss on windows kept apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from short_gpt.evaluation.paired import together
from short_gpt.healing.refit import PARTS, Refit, fit, fold, held_apart
from short_gpt.healing.refit_layer import WEIGHTS
from short_gpt.healing.refit_pass import RIDGES
from short_gpt.scored_model import ScoredModel


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
    """Fits both halves with each weight of tokens, then each half alone with the better one.

    What is kept has the least loss on windows kept apart. It takes four times as long as `fit`,
    whose args and errors it has; the model is as it was afterwards.

    Example:
        >>> fit_best(short, [21], windows).tried  # doctest: +SKIP
        {'none': 61.2, 'attention,mlp inverse': 23.4, 'attention,mlp equal': 24.0, ...}
    """
    windows, held = held_apart(list(windows)) if held is None else (windows, held)

    def fitted(parts: tuple[str, ...], weights: str) -> Refit:
        folder = "-".join([*parts, weights])
        refit = fit(
            short,
            layers,
            windows,
            held=held,
            parts=parts,
            ridges=ridges,
            weights=weights,
            batch_size=batch_size,
            work_dir=None if work_dir is None else Path(os.fspath(work_dir)) / folder,
            progress=progress,
        )
        with short.without_layers(layers):
            tried[_name(refit)] = _perplexity_with(short, refit, held)
        return refit

    def loss(refit: Refit) -> float:
        return tried[_name(refit)]

    with short.without_layers(layers):
        tried = {"none": _perplexity(short, held)}
    best = min((fitted(PARTS, weights) for weights in WEIGHTS), key=loss)
    if {found.part for found in best.fits} == set(PARTS):
        alone = (fitted((part,), best.weights) for part in PARTS)
        best = min(chain([best], alone), key=loss)
    return replace(best, tried=tried)


def _name(refit: Refit) -> str:
    return f"{','.join(refit.parts)} {refit.weights}"


def _perplexity_with(short: ScoredModel, refit: Refit, held: Sequence[Sequence[int]]) -> float:
    undo = fold(short, refit)
    try:
        return _perplexity(short, held)
    finally:
        undo()


def _perplexity(short: ScoredModel, held: Sequence[Sequence[int]]) -> float:
    return together(short.window_losses(held, progress=False)).value

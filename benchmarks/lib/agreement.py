"""The layers that each of several texts would remove, and how far two rankings agree.

Shapes: W windows, G windows or documents, L layers, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from short_gpt import ShortModel
from short_gpt.data.windows import text_number
from short_gpt.runtime.progress import bar
from short_gpt.scoring.metrics import LEAST_DEGREES, student_t
from short_gpt.scoring.moments import degrees_of_freedom

Windows = Sequence[Sequence[int]]
RESAMPLES = 1000


class WindowScores(NamedTuple):
    """The scores of every window of one text; a mean over windows ranks."""

    layers: list[int]  # original numbers
    n: int  # layers to remove
    sums: list[list[float]]  # (W, L): Block Influence over tokens
    weights: list[float]  # divisors of the sums, (W,): tokens
    texts: list[int | None]  # numbers of the windows' documents; None if unknown

    @property
    def means(self) -> np.ndarray:
        """Of all windows, (L,)."""
        return np.asarray(self.sums).sum(0) / np.sum(self.weights)

    @property
    def chosen(self) -> list[int]:
        """The layers to remove, ascending."""
        return np.asarray(self.layers)[self.members(self.means[None])[0]].tolist()

    def members(self, means: np.ndarray) -> np.ndarray:
        """The layers that means choose: (R, L) to booleans (R, L); ties go to the lower."""
        chosen = means.argsort(-1, kind="stable")[:, : self.n]  # (R, n)
        members = np.zeros((len(means), len(self.layers)), dtype=bool)
        np.put_along_axis(members, chosen, True, axis=1)
        return members

    def _units(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums (G, L) and weights (G,) of what is drawn: documents if several, else windows."""
        several = None not in self.texts and len({*self.texts}) > 1
        keys = np.array(self.texts if several else range(len(self.texts)))
        units = [keys == key for key in np.unique(keys)]
        windows = (np.asarray(self.sums), np.asarray(self.weights))
        sums, weights = (np.stack([v[u].sum(0) for u in units]) for v in windows)
        return sums, weights

    def resampled(self, seed: int) -> np.ndarray:
        """Means of windows, or documents, drawn again, (R, L)."""
        sums, weights = self._units()
        drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
        return sums[drawn].sum(1) / weights[drawn].sum(1)[:, None]

    @property
    def degrees(self) -> float:
        """Of freedom, of the windows or documents that are drawn."""
        return degrees_of_freedom(torch.tensor(self._units()[1]))


def score_windows(
    short: ShortModel, windows: Windows, n: int, *, progress: bool = True
) -> WindowScores:
    """Block Influence of every window of one text by itself."""
    scores = WindowScores([*short.kept], n, [], [], [])
    with bar("scoring", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            one = short.score_batch([window])
            scores.sums.append(one.influence[0].cpu().double().tolist())
            scores.weights.append(float(one.tokens[0]))
            scores.texts.append(text_number(window))
            shown.update()
    return scores


class TextAgreement(NamedTuple):
    """How far two rankings agree; 95% intervals by drawing the windows of both again."""

    first: str  # name of a text
    second: str  # of another; the same for the two halves of one
    shared: int  # layers that both would remove
    n: int  # layers that each removes
    shared_interval: tuple[float, float]
    correlation: float  # Spearman's, of all layers, in [-1, 1]
    interval: tuple[float, float]  # of the correlation


def agreement(names: tuple[str, str], first: WindowScores, second: WindowScores) -> TextAgreement:
    """How far two rankings agree."""
    drawn = first.resampled(0), second.resampled(1)  # different seeds: drawn independently
    value = float(correlations(first.means[None], second.means[None])[0])
    interval = stretched_interval(value, correlations(*drawn), min(first.degrees, second.degrees))
    both = (first.members(drawn[0]) & second.members(drawn[1])).sum(1)
    low, high = map(float, np.quantile(both, (0.025, 0.975)))
    shared = len({*first.chosen} & {*second.chosen})
    return TextAgreement(*names, shared, first.n, (low, high), value, interval)


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of rows: (R, L) and (R, L) to (R,); ties in their order."""
    ranks = [values.argsort(-1).argsort(-1).astype(float) for values in (first, second)]
    a, b = (r - r.mean(-1, keepdims=True) for r in ranks)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def stretched_interval(value: float, drawn: np.ndarray, degrees: float) -> tuple[float, float]:
    """The 95% interval of a rank correlation from resamples, stretched as Student's t.

    Noise lowers a correlation, and drawing again lowers it once more: the upper end therefore lies
    at least as far above ``value`` as the lower one, that of the resamples, lies below.
    """
    if degrees < LEAST_DEGREES:
        return -1.0, 1.0
    stretch = student_t(0.975, degrees) / student_t(0.975, 10**6)
    stretch *= math.sqrt((degrees + 1) / degrees)
    low, high = (value + stretch * (np.quantile(drawn, q) - value) for q in (0.025, 0.975))
    upper = max(float(high), 2 * value - float(low), value)
    return max(-1.0, min(float(low), value)), min(1.0, upper)

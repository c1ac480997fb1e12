"""What each text would remove, and how far two such rankings agree, with intervals.

Shapes: W windows, K ranked things (layers, or starts of blocks), L layers, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from short_gpt.data.windows import text_of
from short_gpt.jobs.rows import Windows
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.scoring.metrics import LEAST_DEGREES, student_t
from short_gpt.scoring.moments import degrees_of_freedom
from short_gpt.wrappers.scored_model import ScoredModel

METHODS = ("bi", "relative_magnitude", "angular")
RESAMPLES = 1000


@dataclass(frozen=True)
class WindowScores:
    """What every window of one text gave; a mean over windows ranks.

    Attributes:
        layers: original numbers.
        method: of `METHODS`.
        n: layers to remove; for angular also the length of the blocks that are ranked.
        sums: of every window, (W, K): over its tokens for a score of layers, its distances for
            angular.
        weights: what the sums are divided by, (W,): tokens, or 1 for angular.
        texts: numbers of the documents that the windows are of; None where that is not known.
    """

    layers: list[int]
    method: str
    n: int
    sums: list[list[float]]
    weights: list[float]
    texts: list[int | None]

    @property
    def means(self) -> np.ndarray:
        """Of all windows, (K,)."""
        return np.asarray(self.sums).sum(0) / np.sum(self.weights)

    @property
    def chosen(self) -> list[int]:
        """The layers to remove, ascending."""
        members = self.members(self.means[None])[0]
        return [layer for layer, gone in zip(self.layers, members, strict=True) if gone]

    def members(self, means: np.ndarray) -> np.ndarray:
        """Which layers means choose: (R, K) to (R, L) of True and False; ties to the lower."""
        order = means.argsort(-1, kind="stable")
        found = np.zeros((len(means), len(self.layers)), dtype=bool)
        blocks, length = (1, self.n) if self.method == "angular" else (self.n, 1)
        for column in range(blocks):
            for step in range(length):
                found[np.arange(len(means)), order[:, column] + step] = True
        return found

    def half(self, which: int) -> WindowScores:
        """Every second window, from the first on or from the second."""
        parts = {name: getattr(self, name)[which::2] for name in ("sums", "weights", "texts")}
        return WindowScores(self.layers, self.method, self.n, **parts)

    def _units(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums (G, K) and weights (G,) of what is drawn: documents if several, else windows."""
        known = sorted({text for text in self.texts if text is not None})
        units = [[place] for place in range(len(self.weights))]
        if None not in self.texts and len(known) > 1:
            units = [[i for i, own in enumerate(self.texts) if own == text] for text in known]
        sums = np.stack([np.asarray(self.sums)[unit].sum(0) for unit in units])
        return sums, np.array([np.asarray(self.weights)[unit].sum() for unit in units])

    def resampled(self, seed: int) -> np.ndarray:
        """Means of windows, or documents, drawn anew, (R, K)."""
        sums, weights = self._units()
        drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
        return sums[drawn].sum(1) / weights[drawn].sum(1)[:, None]

    @property
    def degrees(self) -> float:
        """Of freedom, of the windows or documents that are drawn."""
        return degrees_of_freedom(torch.tensor(self._units()[1]))


def score_windows(
    short: ScoredModel, windows: Windows, n: int, *, method: str = "bi", progress: bool = True
) -> WindowScores:
    """Scores of every window of one text by itself; raises ShortGPTError as `hooks.score`."""
    if method not in METHODS:
        raise ShortGPTError(f"no calibration by {method!r}; expected one of {', '.join(METHODS)}")
    sums: list[list[float]] = []
    weights: list[float] = []
    with bar("scoring", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            found = short.score([window])
            if method == "angular":
                sums.append(found.angles[0].double().diagonal(n).tolist())
            else:
                per_layer = found.influence if method == "bi" else found.metric("magnitude")
                sums.append(per_layer[0].double().tolist())
            weights.append(1.0 if method == "angular" else float(found.tokens[0]))
            shown.update()
    texts = [text_of(window) for window in windows]
    return WindowScores(list(short.kept), method, n, sums, weights, texts)


class Agreement(NamedTuple):
    """How far two rankings agree; 95% intervals by drawing the windows of both anew.

    Attributes:
        first, second: names of the texts; the same for the two halves of one.
        shared, n: layers that both would remove, of the n that each removes.
        shared_interval: of ``shared``.
        correlation: Spearman's, of all layers (or starts of blocks), in [-1, 1].
        interval: of ``correlation``.
    """

    first: str
    second: str
    shared: int
    n: int
    shared_interval: tuple[float, float]
    correlation: float
    interval: tuple[float, float]


def agreement(names: tuple[str, str], first: WindowScores, second: WindowScores) -> Agreement:
    """How far two rankings by the same method agree."""
    drawn = first.resampled(0), second.resampled(1)  # different seeds: drawn independently
    value = float(correlations(first.means[None], second.means[None])[0])
    own, other = (s.members(d) for s, d in zip((first, second), drawn, strict=True))
    low, high = np.quantile((own & other).sum(1), (0.025, 0.975))
    return Agreement(
        *names,
        shared=len({*first.chosen} & {*second.chosen}),
        n=first.n,
        shared_interval=(float(low), float(high)),
        correlation=value,
        interval=reach(value, correlations(*drawn), min(first.degrees, second.degrees)),
    )


def agreements(scores: Mapping[str, WindowScores]) -> list[Agreement]:
    """Of all pairs of texts; each with itself by two halves of its windows, if it has two."""
    names = list(scores)
    own = [
        agreement((name, name), found.half(0), found.half(1))
        for name, found in scores.items()
        if len(found.weights) > 1
    ]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return own + [agreement(pair, *(scores[name] for name in pair)) for pair in pairs]


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of rows: (R, K) and (R, K) to (R,); ties in their order."""
    ranks = [values.argsort(-1).argsort(-1).astype(float) for values in (first, second)]
    a, b = (r - r.mean(-1, keepdims=True) for r in ranks)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def reach(value: float, drawn: np.ndarray, degrees: float) -> tuple[float, float]:
    """The 95% interval of a rank correlation from resamples.

    Noise in both rankings lowers their correlation, and drawing anew lowers it once more. So the
    lower end is that of the resamples, and the upper one at least as far above ``value`` as that
    lies below; both are stretched as Student's t is over a normal distribution.
    """
    if degrees < LEAST_DEGREES:
        return -1.0, 1.0
    stretch = student_t(0.975, degrees) / student_t(0.975, 10**6)
    stretch *= math.sqrt((degrees + 1) / degrees)
    low, high = (value + stretch * (np.quantile(drawn, q) - value) for q in (0.025, 0.975))
    upper = max(float(high), 2 * value - float(low), value)
    return max(-1.0, min(float(low), value)), min(1.0, upper)

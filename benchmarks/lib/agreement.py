"""Several texts: the layers that each would remove, and what each choice costs on all texts.

Shapes: W windows, K ranked things (layers, or starts of blocks), L layers, R resamples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch

from short_gpt import ShortModel
from short_gpt.data import hold_out, windows, without_overlap
from short_gpt.data.windows import Text, text_number
from short_gpt.evaluation.perplexity import Perplexity, combined, difference
from short_gpt.healing.choosing import ResultCache, pruned_losses
from short_gpt.healing.refit import RefitSettings
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile, joined
from short_gpt.scoring.metrics import LEAST_DEGREES, student_t
from short_gpt.scoring.moments import degrees_of_freedom

Windows = Sequence[Sequence[int]]
RAW, REFIT = "raw", "refit"
MIX = "mix"  # the name of the choice by all texts
RESAMPLES = 1000
SPARE = 4  # windows cut for each one to judge by, as some may share text with those that rank


class SplitWindows(NamedTuple):
    """Windows of one text: those that choose layers and fit refits, and those to judge by."""

    ranking: Windows
    judged: Windows


class WindowScores(NamedTuple):
    """The scores of every window of one text; a mean over windows ranks."""

    layers: list[int]  # original numbers
    method: str  # bi, relative_magnitude or angular
    n: int  # layers to remove; for angular also the length of the blocks that are ranked
    sums: list[list[float]]  # (W, K): over tokens for a score of layers, distances for angular
    weights: list[float]  # divisors of the sums, (W,): tokens, or 1 for angular
    texts: list[int | None]  # numbers of the windows' documents; None if unknown

    @property
    def means(self) -> np.ndarray:
        """Of all windows, (K,)."""
        return np.asarray(self.sums).sum(0) / np.sum(self.weights)

    @property
    def chosen(self) -> list[int]:
        """The layers to remove, ascending."""
        return np.asarray(self.layers)[self.members(self.means[None])[0]].tolist()

    def members(self, means: np.ndarray) -> np.ndarray:
        """The layers that means choose: (R, K) to booleans (R, L); ties go to the lower."""
        blocks, length = (1, self.n) if self.method == "angular" else (self.n, 1)
        starts = means.argsort(-1, kind="stable")[:, :blocks, None]
        chosen = (starts + np.arange(length)).reshape(len(means), -1)  # (R, n)
        members = np.zeros((len(means), len(self.layers)), dtype=bool)
        np.put_along_axis(members, chosen, True, axis=1)
        return members

    def half(self, which: int) -> WindowScores:
        """Every second window, from the first or from the second."""
        sums, weights, texts = self.sums[which::2], self.weights[which::2], self.texts[which::2]
        return self._replace(sums=sums, weights=weights, texts=texts)

    def _units(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums (G, K) and weights (G,) of what is drawn: documents if several, else windows."""
        several = None not in self.texts and len({*self.texts}) > 1
        keys = np.array(self.texts if several else range(len(self.texts)))
        units = [keys == key for key in np.unique(keys)]
        windows = (np.asarray(self.sums), np.asarray(self.weights))
        sums, weights = (np.stack([v[u].sum(0) for u in units]) for v in windows)
        return sums, weights

    def resampled(self, seed: int) -> np.ndarray:
        """Means of windows, or documents, drawn again, (R, K)."""
        sums, weights = self._units()
        drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
        return sums[drawn].sum(1) / weights[drawn].sum(1)[:, None]

    @property
    def degrees(self) -> float:
        """Of freedom, of the windows or documents that are drawn."""
        return degrees_of_freedom(torch.tensor(self._units()[1]))


def score_windows(
    short: ShortModel, windows: Windows, n: int, *, method: str = "bi", progress: bool = True
) -> WindowScores:
    """Scores of every window of one text by itself; ``method`` as in `WindowScores`."""
    scores, angular = WindowScores([*short.kept], method, n, [], [], []), method == "angular"
    with bar("scoring", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            one = short.score_batch([window])
            if angular:
                own = one.angles[0].diagonal(n)  # of blocks of n layers, (K,)
            else:
                own = (one.influence if method == "bi" else one.metric("magnitude"))[0]  # (L,)
            scores.sums.append(own.cpu().double().tolist())
            scores.weights.append(1.0 if angular else float(one.tokens[0]))
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
    correlation: float  # Spearman's, of all layers (or starts of blocks), in [-1, 1]
    interval: tuple[float, float]  # of the correlation


def agreement(names: tuple[str, str], first: WindowScores, second: WindowScores) -> TextAgreement:
    """How far two rankings by the same method agree."""
    drawn = first.resampled(0), second.resampled(1)  # different seeds: drawn independently
    value = float(correlations(first.means[None], second.means[None])[0])
    interval = stretched_interval(value, correlations(*drawn), min(first.degrees, second.degrees))
    both = (first.members(drawn[0]) & second.members(drawn[1])).sum(1)
    low, high = map(float, np.quantile(both, (0.025, 0.975)))
    shared = len({*first.chosen} & {*second.chosen})
    return TextAgreement(*names, shared, first.n, (low, high), value, interval)


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of rows: (R, K) and (R, K) to (R,); ties in their order."""
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


class CrossResult(NamedTuple):
    """One choice on one text."""

    choice: str  # the text that chose the layers and that a refit was fitted on; or `MIX`
    text: str  # that it is judged on
    healing: str  # raw or refit
    layers: list[int]  # removed
    perplexity: float  # on the text
    nats: float  # mean loss minus that of the original model, paired over the windows
    standard_error: float  # of nats
    excess: float  # mean loss minus that with the text's own choice, healed the same way
    excess_error: float  # standard error of excess
    excess_most: float  # its upper end, one-sided 95%; infinite if unknown
    windows: int  # that the errors are over
    texts: int | None  # of the windows; see `evaluation.Difference`


class CalibrationResult(NamedTuple):
    """What `calibrate` gives."""

    n: int  # layers that each choice removes
    method: str  # that chose them
    choices: Mapping[str, list[int]]  # layers by text, and by all texts together (`MIX`)
    agreement: list[TextAgreement]  # of all pairs; of a text with itself: of its two halves
    ways: Mapping[str, list[TextAgreement]]  # of each text with itself cut another way, by its name
    cells: list[CrossResult]  # every choice on every text
    state: StateFile | None = None  # what was measured, to be cleared once the result is safe

    def to_dict(self) -> dict[str, object]:
        """All except the state, ready for JSON, which has no number for an error of one window."""
        content = self._asdict() | {"agreement": [own._asdict() for own in self.agreement]}
        content["ways"] = {way: [a._asdict() for a in own] for way, own in self.ways.items()}
        content["cells"] = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row}
            for row in (cell._asdict().items() for cell in self.cells)
        ]
        del content["state"]
        return content


def calibrate(
    short: ShortModel,
    texts: Mapping[str, SplitWindows],
    n: int,
    *,
    method: str = "bi",
    healings: Sequence[str] = (RAW, REFIT),
    ways: Mapping[str, Mapping[str, Windows]] | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CalibrationResult:
    """Ranks on each text, and judges each text's choice of layers on all texts.

    All texts together, with equal weights, make one more choice; its refit reads windows of all,
    as many as one text has.

    Args:
        short: the original model, which stays unchanged.
        texts: at least two, of different kinds, by their names.
        method: bi, relative_magnitude or angular.
        ways: windows to rank on that were cut in other ways, by the way's name and the text's.
        state: file that the run is saved in, to be continued, until ``result.state.clear()``.
    """
    # in the order of the texts, which is that of the losses
    read = [[name, *map(windows_digest, parts)] for name, parts in texts.items()]
    identity = joined(short.identity(), {"texts": read, "refit": vars(RefitSettings())})
    saved = None if state is None else StateFile(state, identity)
    run = _Run(short, texts, ResultCache(saved), progress)
    scores = run.scores({name: parts.ranking for name, parts in texts.items()}, n, method)
    choices = {name: own.chosen for name, own in scores.items()} | {MIX: mixed(scores)}
    halves = {a: (own.half(0), own.half(1)) for a, own in scores.items() if len(own.weights) > 1}
    pairs = [agreement((a, a), *own) for a, own in halves.items()]
    pairs += [agreement((a, b), scores[a], scores[b]) for a, b in combinations(scores, 2)]
    by_way = {
        way: [agreement((a, a), scores[a], b) for a, b in run.scores(own, n, method, way).items()]
        for way, own in (ways or {}).items()
    }
    cells = [cell for healing in healings for cell in run.crossed(choices, healing)]
    return CalibrationResult(n, method, choices, pairs, by_way, cells, saved)


def mixed(scores: Mapping[str, WindowScores]) -> list[int]:
    """The layers that all texts together choose, with equal weights."""
    means, first = [own.means.tolist() for own in scores.values()], next(iter(scores.values()))
    return first._replace(sums=means, weights=[1.0] * len(means), texts=[None] * len(means)).chosen


class _Run(NamedTuple):
    """The measurements, each made once."""

    short: ShortModel
    texts: Mapping[str, SplitWindows]
    cells: ResultCache
    progress: bool

    def scores(
        self, windows: Mapping[str, Windows], n: int, method: str, way: str = ""
    ) -> dict[str, WindowScores]:
        """Scores of each text's windows; ``way`` is how they were cut, if not as usual."""
        prefix = f"scores {method}" + (f" {n}" if method == "angular" else "")
        scores = {}
        for name, own in windows.items():

            def measure(own: Windows = own, show: bool = self.progress) -> dict[str, Any]:
                return score_windows(self.short, own, n, method=method, progress=show)._asdict()

            cell = f"{prefix} {name}" + (f" {way} {windows_digest(own)}" if way else "")
            scores[name] = WindowScores(**{**self.cells.value(cell, measure), "n": n})
        return scores

    def crossed(self, choices: Mapping[str, list[int]], healing: str) -> list[CrossResult]:
        """Every choice on every text, healed one way; a refit is fitted on the text that chose."""
        rankings = {name: parts.ranking for name, parts in self.texts.items()}
        turns = [w for turn in zip_longest(*rankings.values()) for w in turn if w is not None]
        rankings[MIX] = turns[: max(map(len, rankings.values()))]
        original, healed = self._losses(f"{RAW} []", []), {}
        with bar(healing, total=len(choices), unit="choice", show=self.progress) as shown:
            for choice, layers in choices.items():
                cell, fit_on = f"{healing} {sorted(layers)}", None
                if healing == REFIT:
                    cell, fit_on = f"{cell} {choice}", rankings[choice]
                healed[choice] = self._losses(cell, layers, fit_on)
                shown.update()
        rows = []
        for choice, by_text in healed.items():
            for text, pruned in by_text.items():
                cost = difference(original[text], pruned)
                excess = difference(healed[text][text], pruned)
                most = excess.nats + excess.error.margin(0.9)  # one-sided 95%
                own = choice == text
                row = CrossResult(
                    choice=choice,
                    text=text,
                    healing=healing,
                    layers=choices[choice],
                    perplexity=combined(pruned).value,
                    nats=cost.nats,
                    standard_error=cost.standard_error,
                    excess=excess.nats,
                    excess_error=0.0 if own else excess.standard_error,
                    excess_most=0.0 if own else math.inf if math.isnan(most) else most,
                    windows=cost.windows,
                    texts=cost.texts,
                )
                rows.append(row)
        return rows

    def _losses(
        self, cell: str, layers: list[int], fit_on: Windows | None = None
    ) -> dict[str, list[Perplexity]]:
        judged = [window for parts in self.texts.values() for window in parts.judged]
        measure = partial(pruned_losses, self.short, layers, judged, fit_on=fit_on)
        losses = iter(
            self.cells.perplexities(cell, measure)
        )  # of all texts' windows, in their order
        return {text: [next(losses) for _ in own.judged] for text, own in self.texts.items()}


def windows_apart(
    encode: Callable[[str], list[int]],
    documents: Mapping[str, Sequence[Text]],
    *,
    size: int,
    others: Sequence[int],
    count: int,
    judged: int,
) -> tuple[dict[str, SplitWindows], dict[str, dict[str, Windows]]]:
    """Windows of each text, ``count`` to rank on and others to judge by; and those cut otherwise.

    The other ways are those of ``others`` tokens, and of ``size`` with bos before every window.
    """

    def cut(texts: Sequence[Text], limit: int, tokens: int = size, bos: str = "first") -> Windows:
        return list(
            windows(texts, encode, size=tokens, stride=tokens, seed=0, limit=limit, bos=bos)
        )

    parts = {name: hold_out(own, share=0.5, seed=0) for name, own in documents.items()}
    ranking = {name: cut(own, count) for name, (own, _) in parts.items()}
    ranked_on = [window for own in ranking.values() for window in own]
    texts = {}
    for name, (_, other) in parts.items():
        free, _ = without_overlap(cut(other, SPARE * judged), ranked_on)
        texts[name] = SplitWindows(ranking[name], free[:judged])
    ways = {}
    for tokens, bos in [*((tokens, "first") for tokens in others), (size, "every")]:
        limit = max(2, count * size // tokens)
        cuts = {name: cut(own, limit, tokens, bos) for name, (own, _) in parts.items()}
        ways[f"{tokens} tokens, bos {bos}"] = cuts
    return texts, ways


def calibrated(result: CalibrationResult) -> str:
    """What each text chooses, how far rankings agree, and what each choice costs."""
    lines = [f"layers that each text would remove, by {result.method}"]
    lines += [f"  {name:<22}{layers}" for name, layers in result.choices.items()]
    lines += ["", *_rankings("rankings", result.agreement)]
    for way, agreed in result.ways.items():
        lines += ["", *_rankings(f"with windows of {way}", agreed)]
    for healing in dict.fromkeys(cell.healing for cell in result.cells):
        lines += ["", *_crossed([cell for cell in result.cells if cell.healing == healing])]
    return "\n".join(lines)


def _rankings(head: str, agreed: Sequence[TextAgreement]) -> list[str]:
    lines = [f"{head:<40}{'layers in common':>22}{'rank correlation (95%)':>30}"]
    for a in agreed:
        pair = f"{a.first}, {'its halves' if a.first == a.second else a.second}"
        low, high = a.shared_interval
        shared = f"{a.shared} of {a.n} ({low:.0f} to {high:.0f})"
        value = f"{a.correlation:.3f} ({a.interval[0]:.3f} to {a.interval[1]:.3f})"
        lines.append(f"  {pair:<38}{shared:>22}{value:>30}")
    return lines


def _crossed(cells: Sequence[CrossResult]) -> list[str]:
    texts = "".join(f"{text:>22}" for text in dict.fromkeys(c.text for c in cells))
    lines = [f"{cells[0].healing}: nats a token beyond the text's own choice (standard error)"]
    lines.append(f"{'chosen on':<24}{texts}")
    for choice in dict.fromkeys(c.choice for c in cells):
        own = [c for c in cells if c.choice == choice]
        row = [f"{c.excess:+.3f} ({c.excess_error:.3f})" for c in own]
        lines.append(f"  {choice:<22}" + "".join(f"{cell:>22}" for cell in row))
    return lines

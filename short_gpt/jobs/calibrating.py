"""Rankings on several texts, and what each text's choice of layers costs on all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import NamedTuple

from llama.io.json_files import JsonObject
from short_gpt.data.disjoint import check_disjoint
from short_gpt.evaluation.paired import Difference, difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import refit
from short_gpt.jobs.calibration_rankings import (
    Agreement,
    WindowScores,
    agreement,
    agreements,
    score_windows,
)
from short_gpt.jobs.cells import Cells
from short_gpt.jobs.rows import RAW, REFIT, Windows
from short_gpt.models.numbering import check_count
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile, joined
from short_gpt.wrappers.short_model import ShortModel

HEALINGS = (RAW, REFIT)
MIX = "mix"  # the name of the choice by all texts


class Apart(NamedTuple):
    """Windows of one text: those that choose layers and fit refits, and those to judge by."""

    ranking: Windows
    judged: Windows


@dataclass(frozen=True)
class Crossed:
    """One choice on one text.

    Attributes:
        choice: the text that chose the layers, and that a refit was fitted on; or `MIX`.
        text: the one it is judged on.
        healing: raw or refit.
        layers: removed.
        perplexity: on the text.
        nats, standard_error: mean loss less that of the whole model, paired over the windows.
        excess, excess_error: mean loss less that with the text's own choice, healed the same way;
            0 for that itself.
        excess_most: the upper end of the excess, one-sided 95%.
        windows, texts: that the errors are over; see `evaluation.Difference`.
    """

    choice: str
    text: str
    healing: str
    layers: list[int]
    perplexity: float
    nats: float
    standard_error: float
    excess: float
    excess_error: float
    excess_most: float
    windows: int
    texts: int | None


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` gives.

    Attributes:
        n, method: layers that each choice removes, and by what.
        choices: layers by text, and by all texts together (`MIX`).
        agreement: of all pairs of texts; of one with itself, of two halves of its windows.
        ways: for windows cut another way, by its name, of each text with itself cut as above.
        cells: every choice on every text.
        state: the file that holds what was measured, to be cleared once the result is safe.
    """

    n: int
    method: str
    choices: Mapping[str, list[int]]
    agreement: list[Agreement]
    ways: Mapping[str, list[Agreement]]
    cells: list[Crossed]
    state: StateFile | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, object]:
        """All but the state, ready for JSON."""
        return {
            "n": self.n,
            "method": self.method,
            "choices": dict(self.choices),
            "agreement": [asdict(found) for found in self.agreement],
            "ways": {way: [asdict(a) for a in found] for way, found in self.ways.items()},
            "cells": [_finite(asdict(cell)) for cell in self.cells],
        }


def _finite(content: JsonObject) -> JsonObject:
    """None for what JSON has no number for: an error of one window."""
    known = {k: v for k, v in content.items() if not isinstance(v, float) or math.isfinite(v)}
    return {**dict.fromkeys(content), **known}


def calibrate(
    short: ShortModel,
    texts: Mapping[str, Apart],
    n: int,
    *,
    method: str = "bi",
    healings: Sequence[str] = HEALINGS,
    ways: Mapping[str, Mapping[str, Windows]] | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibrated:
    """Ranks on each text, and judges each text's choice of layers on all texts.

    One choice more is made by all texts together, each of the same weight, and refitted on windows
    of all, as many as one text has.

    Args:
        short: the whole model; it is left as it was.
        texts: at least two, of different kinds, by their names.
        n: layers to remove.
        method: bi, relative_magnitude or angular.
        healings: raw, refit or both.
        ways: windows to rank on that were cut another way, by its name and the text's.
        state: file that the run is saved in; it continues there after an interruption.
        progress: whether to show bars.

    Returns:
        Choices, agreement and losses. The state file stays until ``result.state.clear()``.

    Raises:
        ShortGPTError: fewer than two texts, a name or number that is none, windows to rank on that
            share text with those to judge by, or the state is of another run.

    Example:
        >>> texts = {"novels": Apart(a, b), "code": Apart(c, d)}  # doctest: +SKIP
        >>> calibrate(short, texts, 8).cells  # doctest: +SKIP
    """
    _check(short, texts, n, healings)
    kept = None if state is None else StateFile(state, _identity(short, texts))
    run = _Run(short, texts, Cells(kept), progress=progress)
    scores = run.scores({name: parts.ranking for name, parts in texts.items()}, n, method)
    others = {way: run.scores(windows, n, method, way=way) for way, windows in (ways or {}).items()}
    choices = {name: found.chosen for name, found in scores.items()} | {MIX: mixed(scores)}
    cells = [cell for healing in healings for cell in run.crossed(choices, healing)]
    between = {
        way: [agreement((name, name), scores[name], own) for name, own in found.items()]
        for way, found in others.items()
    }
    return Calibrated(n, method, choices, agreements(scores), between, cells, state=kept)


def mixed(scores: Mapping[str, WindowScores]) -> list[int]:
    """The layers that all texts together choose, each of the same weight."""
    each = list(scores.values())
    means = [list(found.means) for found in each]
    ones: list[int | None] = [None] * len(means)
    first = each[0]
    whole = WindowScores(first.layers, first.method, first.n, means, [1.0] * len(means), ones)
    return whole.chosen


def _check(short: ShortModel, texts: Mapping[str, Apart], n: int, healings: Sequence[str]) -> None:
    if len(texts) < 2:
        raise ShortGPTError(
            f"expected two texts or more, of different kinds, got {', '.join(texts) or 'none'}"
        )
    if MIX in texts:
        raise ShortGPTError(f"{MIX} is the name of all texts together: call the text otherwise")
    if not healings or (odd := [h for h in healings if h not in HEALINGS]):
        got = odd[0] if healings else "none"
        raise ShortGPTError(f"healing {got}: expected some of {', '.join(HEALINGS)}")
    check_count(n, len(short.kept))
    short.check_whole()
    ranking, judged = ([w for parts in texts.values() for w in parts[i]] for i in (0, 1))
    for name, parts in texts.items():
        if not parts.ranking or not parts.judged:
            raise ShortGPTError(f"{name}: expected windows to rank on and others to judge by")
    check_disjoint(ranking, judged)


def _identity(short: ShortModel, texts: Mapping[str, Apart]) -> dict[str, object]:
    """What the results rest on; choices, numbers and healings are named by the cells."""
    read = [  # in their order, in which the losses stand
        [name, *(json_digest([list(w) for w in windows]) for windows in parts)]
        for name, parts in texts.items()
    ]
    return joined(short.identity(), {"texts": read})


class _Run:
    """What is measured, every cell once."""

    def __init__(
        self, short: ShortModel, texts: Mapping[str, Apart], cells: Cells, *, progress: bool
    ) -> None:
        self._short, self._texts, self._cells, self._progress = short, texts, cells, progress

    def scores(
        self, windows: Mapping[str, Windows], n: int, method: str, *, way: str | None = None
    ) -> dict[str, WindowScores]:
        """Scores of each text's windows; ``way`` is how they were cut, if not as the others."""
        blocks = f" {n}" if method == "angular" else ""
        found = {}
        for name, own in windows.items():
            read = json_digest([list(w) for w in own])
            cell = f"scores {method}{blocks} {name}" + (f" {way} {read}" if way else "")
            content = self._cells.value(cell, partial(self._scored, own, n, method))
            found[name] = WindowScores(**{**content, "n": n})
        return found

    def _scored(self, windows: Windows, n: int, method: str) -> JsonObject:
        found = score_windows(self._short, windows, n, method=method, progress=self._progress)
        return found.to_dict()

    def crossed(self, choices: Mapping[str, list[int]], healing: str) -> list[Crossed]:
        """Every choice on every text, healed one way."""
        whole, found = self._judged([], RAW), {}
        with bar(healing, total=len(choices), unit="choice", show=self._progress) as shown:
            for name, layers in choices.items():
                found[name] = self._judged(layers, healing, name)
                shown.update()
        return [
            _cell(choice, text, healing, choices[choice], whole[text], parts[text], own)
            for choice, parts in found.items()
            for text in self._texts
            for own in [found[text][text]]
        ]

    def _judged(
        self, layers: list[int], healing: str, choice: str = ""
    ) -> dict[str, list[Perplexity]]:
        """Losses of every text's windows without the layers, healed on the text that chose."""
        cell = f"{healing} {sorted(layers)}" + (f" {choice}" if healing == REFIT else "")
        measure = self._refitted if healing == REFIT else self._raw
        parts = self._cells.losses(cell, lambda: measure(layers, choice))
        found, start = {}, 0
        for name, own in self._texts.items():
            found[name] = parts[start : start + len(own.judged)]
            start += len(own.judged)
        return found

    def _raw(self, layers: list[int], choice: str) -> list[Perplexity]:
        with self._short.without_layers(layers):
            return self._losses()

    def _losses(self) -> list[Perplexity]:
        """Of all texts' windows, in their order."""
        judged = [window for parts in self._texts.values() for window in parts.judged]
        return losses(self._short.decoder, judged, progress=False)

    def _refitted(self, layers: list[int], choice: str) -> list[Perplexity]:
        learned = self._mix() if choice == MIX else self._texts[choice].ranking
        made = refit.fit(self._short, layers, learned, progress=False)
        with self._short.without_layers(layers):
            undo = refit.fold(self._short, made)
            try:
                return self._losses()
            finally:
                undo()

    def _mix(self) -> Windows:
        """Windows of all texts in turn, as many as the text with the most has."""
        each = [parts.ranking for parts in self._texts.values()]
        count = max(map(len, each))
        turns = [w for place in range(count) for own in each for w in own[place : place + 1]]
        return turns[:count]


def _cell(
    choice: str,
    text: str,
    healing: str,
    layers: list[int],
    whole: list[Perplexity],
    parts: list[Perplexity],
    own: list[Perplexity],
) -> Crossed:
    """One choice on one text.

    Args:
        choice, text, healing, layers: as of `Crossed`.
        whole, parts, own: losses of the text's windows by the whole model, without the layers, and
            without those that the text itself would choose.
    """
    cost, excess = difference(whole, parts), difference(own, parts)
    return Crossed(
        choice=choice,
        text=text,
        healing=healing,
        layers=layers,
        perplexity=together(parts).value,
        nats=cost.nats,
        standard_error=cost.standard_error,
        excess=excess.nats,
        excess_error=excess.standard_error if choice != text else 0.0,
        excess_most=_most(excess) if choice != text else 0.0,
        windows=cost.windows,
        texts=cost.texts,
    )


def _most(excess: Difference) -> float:
    """The upper end of a difference, one-sided 95%; infinite where one window tells nothing."""
    reach = excess.error.reach(0.95, sides=1)
    return excess.nats + reach if reach == reach else float("inf")

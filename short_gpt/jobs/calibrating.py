"""Several texts: the layers that each would remove, and what each choice costs on all texts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from llama.io.json_files import JsonObject
from short_gpt.data.disjoint import check_disjoint
from short_gpt.evaluation.paired import difference, losses, together
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


class Crossed(NamedTuple):
    """One choice on one text.

    Attributes:
        choice: the text that chose the layers, and that a refit was fitted on; or `MIX`.
        text: the one it is judged on.
        healing: raw or refit.
        layers: removed.
        perplexity: on the text.
        nats, standard_error: mean loss less that of the original model, paired over the windows.
        excess, excess_error: mean loss less that with the text's own choice, healed the same way;
            0 for that itself.
        excess_most: the upper end of the excess, one-sided 95%; infinite where it is not known.
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
        """All but the state, ready for JSON, which has no number for an error of one window."""
        cells = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row}
            for row in (cell._asdict().items() for cell in self.cells)
        ]
        return {
            "n": self.n,
            "method": self.method,
            "choices": dict(self.choices),
            "agreement": [found._asdict() for found in self.agreement],
            "ways": {way: [a._asdict() for a in found] for way, found in self.ways.items()},
            "cells": cells,
        }


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
        short: the original model; it is left as it was.
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
    read = [  # in their order, in which the losses stand
        [name, *(json_digest([list(w) for w in windows]) for windows in parts)]
        for name, parts in texts.items()
    ]
    kept = None if state is None else StateFile(state, joined(short.identity(), {"texts": read}))
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
    means = [list(found.means) for found in scores.values()]
    texts: list[int | None] = [None] * len(means)
    first, ones = next(iter(scores.values())), [1.0] * len(means)
    return replace(first, sums=means, weights=ones, texts=texts).chosen


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
    for name, parts in texts.items():
        if not parts.ranking or not parts.judged:
            raise ShortGPTError(f"{name}: expected windows to rank on and others to judge by")
    check_disjoint(*([w for parts in texts.values() for w in parts[i]] for i in (0, 1)))


class _Run:
    """What is measured, every cell once."""

    def __init__(
        self, short: ShortModel, texts: Mapping[str, Apart], cells: Cells, *, progress: bool
    ) -> None:
        self._short, self._texts, self._cells, self._progress = short, texts, cells, progress
        self._judged = [window for parts in texts.values() for window in parts.judged]

    def scores(
        self, windows: Mapping[str, Windows], n: int, method: str, *, way: str | None = None
    ) -> dict[str, WindowScores]:
        """Scores of each text's windows; ``way`` is how they were cut, if not as the others."""
        blocks = f" {n}" if method == "angular" else ""
        found = {}
        for name, own in windows.items():

            def measure(own: Windows = own) -> JsonObject:
                found = score_windows(self._short, own, n, method=method, progress=self._progress)
                return asdict(found)

            digest = json_digest([list(w) for w in own])
            cell = f"scores {method}{blocks} {name}" + (f" {way} {digest}" if way else "")
            found[name] = WindowScores(**{**self._cells.value(cell, measure), "n": n})
        return found

    def crossed(self, choices: Mapping[str, list[int]], healing: str) -> list[Crossed]:
        """Every choice on every text, healed one way."""
        whole, found = self._losses([], RAW), {}
        with bar(healing, total=len(choices), unit="choice", show=self._progress) as shown:
            for name, layers in choices.items():
                found[name] = self._losses(layers, healing, name)
                shown.update()
        return [
            _cell((choice, text, healing), choices[choice], whole[text], parts[text], own)
            for choice, parts in found.items()
            for text in self._texts
            for own in [found[text][text]]
        ]

    def _losses(
        self, layers: list[int], healing: str, choice: str = ""
    ) -> dict[str, list[Perplexity]]:
        """Losses of every text's windows without the layers, healed on the text that chose."""

        def measure() -> list[Perplexity]:
            if healing == RAW:
                with self._short.without_layers(layers):
                    return losses(self._short.decoder, self._judged, progress=False)
            learned = self._mix() if choice == MIX else self._texts[choice].ranking
            result = refit.fit(self._short, layers, learned, progress=False)
            with self._short.without_layers(layers):
                undo = refit.fold(self._short, result)
                try:
                    return losses(self._short.decoder, self._judged, progress=False)
                finally:
                    undo()

        cell = f"{healing} {sorted(layers)}" + (f" {choice}" if healing == REFIT else "")
        parts = iter(self._cells.losses(cell, measure))  # of all texts' windows, in their order
        return {name: [next(parts) for _ in own.judged] for name, own in self._texts.items()}

    def _mix(self) -> Windows:
        """Windows of all texts in turn, as many as the text with the most has."""
        each = [parts.ranking for parts in self._texts.values()]
        count = max(map(len, each))
        turns = [w for place in range(count) for own in each for w in own[place : place + 1]]
        return turns[:count]


def _cell(
    names: tuple[str, str, str],
    layers: list[int],
    whole: list[Perplexity],
    parts: list[Perplexity],
    own: list[Perplexity],
) -> Crossed:
    """One choice on one text, from the losses of the text's windows.

    Args:
        names: choice, text and healing.
        layers: that the choice removes.
        whole, parts, own: by the original model, without the layers, and without those that the
            text itself would choose.
    """
    cost, excess = difference(whole, parts), difference(own, parts)
    upper = excess.nats + excess.error.reach(0.95, sides=1)
    foreign = names[0] != names[1]
    return Crossed(
        *names,
        layers=layers,
        perplexity=together(parts).value,
        nats=cost.nats,
        standard_error=cost.standard_error,
        excess=excess.nats,
        excess_error=excess.standard_error if foreign else 0.0,
        excess_most=(math.inf if math.isnan(upper) else upper) if foreign else 0.0,
        windows=cost.windows,
        texts=cost.texts,
    )

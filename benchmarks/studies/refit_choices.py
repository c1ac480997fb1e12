"""Step size, ridge, attention sinks and realigned inputs of the refit, by the real model's loss.

8 of 30 layers are removed: greedy search's, or those of lowest Block Influence on the model's own
samples. Every case refits the pruned model on windows of the book and of another text, half of
each. It is judged on other windows of these, and on novels: windows that no refit reads and by
which no other script judges, so that the settings are chosen apart from what judges the refit.
Differences are paired over windows. The ridge ``local`` is that of 0.01, 0.1 and 1 that lowers the
error of a matrix on held-out windows most. The group ``sinks`` has the patch, too, and sets whose
removal takes away the state of a window's first token: it weighs 1 / ||T||^2 as other tokens in the
first of two fits, and more in the second.

    python benchmarks/studies/refit_choices.py --also FILE --others FILE --out refit_choices.json

``--also`` and ``--others`` are as in ``healing.py``; ``--sets`` runs one set of layers, ``--only``
some groups of cases. Cases are kept in a state beside the file, and the same command continues from
it. The original model runs once for all refits: `healing.py` measures what a refit takes.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
from torch import Tensor

from benchmarks.baselines.realigned import realigned
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.studies.healing import Windows, both_held_out, chosen_by, fitted_on, judged_by
from benchmarks.studies.scoring import build
from short_gpt import ShortModel, open_model, own_samples
from short_gpt.data import demo
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import Perplexity, Sample, combined, difference
from short_gpt.healing import refit
from short_gpt.healing.refit_layer import Batches, LayerRefit
from short_gpt.healing.refit_state import HiddenStates
from short_gpt.healing.solver import NormalEquations
from short_gpt.models.decoder import pad
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile
from short_gpt.selection.search import PartialRun
from short_gpt.wrappers.opening import open_trainable

SETS = {
    "greedy search": [3, 12, 13, 14, 15, 16, 17, 18],
    "Block Influence": [12, 13, 14, 15, 16, 17, 25, 26],
    "best angular block": [11, 12, 13, 14, 15, 16, 17, 18],
    "layers 1 to 4": [1, 2, 3, 4],
    "layers 2 and 3": [2, 3],
}
HELD = "held-out windows of the fit"
LOCAL = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Case:
    """Settings of a refit, and the ridge of the maps that realign its inputs, if there are any."""

    step_size: float = 0.5
    ridges: tuple[float, ...] | None = None  # None: `times` the inputs by tokens, F / N
    maps: float | None = None
    times: float = 2.0
    lost: float | None = 2.0  # of its settings, see there
    where: str = "all"

    @property
    def name(self) -> str:
        if self.ridges is None:
            ridge = "F / N" if self.times == 1 else f"{self.times:g} F / N"
        else:
            ridge = "local" if self.ridges == LOCAL else f"{self.ridges[0]:g}"
        maps = "" if self.maps is None else f", inputs realigned (ridge {self.maps:g})"
        patch = "patch, " if self.where == "gaps" else ""
        sinks = ", sinks as other tokens" if self.lost is None else ""
        return f"{patch}step {self.step_size:g}, ridge {ridge}{maps}{sinks}"


USUAL = Case()
OTHERS = [*(Case(step) for step in (0.2, 0.35, 0.7, 1.0)), Case(maps=0.1)]
RIDGES = [Case(ridges=ridges) for ridges in (LOCAL, *((r,) for r in (0.03, 0.1, 0.3, 1.0, 3.0)))]
RIDGES += [Case(times=times) for times in (1.0, 4.0)]
# by group, every case with the one that it is compared with
CASES = {
    "usual": dict.fromkeys([USUAL, *OTHERS], USUAL),
    "ridges": dict.fromkeys(RIDGES, USUAL),
    "sinks": {
        case: replace(usual, lost=None)
        for usual in (USUAL, Case(1.0, LOCAL, where="gaps"))  # by default
        for case in (replace(usual, lost=None), usual)
    },
}


def main(
    also: str,
    others: str,
    model: str = "smollm2",
    count: int = 24,
    own: int = 0,
    size: int = 512,
    judged: int = 8,
    only: str | Sequence[str] = ("usual", "ridges"),
    sets: str | Sequence[str] = ("greedy search", "Block Influence"),
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        also, others: as in ``healing.py``.
        model: "smollm2" or another of ``real_models.py``.
        count: windows to refit on, half of each text.
        own: windows of the model's own text to refit on beside them.
        size: their tokens, and those of the windows that judge.
        judged: windows of each kind to judge by.
        only: groups of cases; sets: names of sets of layers.
        out, overwrite: the JSON file.
    """
    begin(out, overwrite=overwrite)
    short = build() if model == "smollm2" else open_trainable(str(MODELS[model]()))
    learned = fitted_on(short, count // 2, count // 2, also, size)
    if named(only) == ["sinks"]:  # which chooses no setting
        kinds = judged_by(short, also, others, judged, size)
    else:
        kinds = chosen_by(short, also, others, learned, judged, size)
    if own:
        learned += own_samples(
            open_model(str(demo.gguf_file())), own, size, beside=Path(out or "refit_choices")
        )
        random.Random(0).shuffle(learned)  # every eighth is held out
    else:
        learned = both_held_out(learned)
    read = {"fitted on": json_digest(learned), "judged by": json_digest(kinds)}
    identity = {"model": short.identity(), **read}
    cells = Cells(StateFile(f"{out or 'refit_choices'}.state", identity, every=0.0))
    result: dict[str, Any] = {}
    for name in named(sets):
        trial = Trial(cells, short, kinds, SETS[name], learned)
        result[name] = trial.models()
        for group in named(only):
            result[name][group] = rows = {}
            for case, than in CASES[group].items():
                rows[case.name] = trial.row(case, than)
                print(line(name, case.name, rows[case.name]), flush=True)
    content = {
        "model": model,
        "windows": count,
        "own_windows": own,
        "tokens_per_window": size,
        "judged": judged,
        "sets": result,
    }
    finish("refit_choices", [], content, out=out, overwrite=overwrite)


def named(listed: str | Sequence[str]) -> Sequence[str]:
    return listed.split(",") if isinstance(listed, str) else listed  # fire makes a,b a tuple


class Trial:
    """Refits of a model without some layers, each measured once."""

    def __init__(
        self,
        cells: Cells,
        short: ShortModel,
        kinds: Mapping[str, Windows],
        layers: list[int],
        learned: Windows,
    ) -> None:
        self._cells, self._short, self._layers = cells, short, layers
        self._fitted, self._held = refit.split_held_out(learned)
        self._kinds = {**kinds, HELD: self._held}
        self._start = max(layers[0] - 1, 0)  # up to here no refit changes anything
        self._entering: dict[str, list[Tensor]] = {}  # that layer, by kind and window, (1, S, D)
        self._originals: dict[str, Originals] = {"all": {}, "gaps": {}}

    def models(self) -> dict[str, Any]:
        """The layers, and the perplexities of the original and of the pruned model."""
        count = len(self._short.kept)
        original = self._cells.value("original", lambda: self._nats(0, count))
        pruned = self._cells.value(f"pruned {self._layers}", self._pruned)
        rows = {"original": original, "pruned": pruned}
        return {"layers": self._layers, **{name: perplexities(nats) for name, nats in rows.items()}}

    def row(self, case: Case, than: Case) -> dict[str, Any]:
        """Perplexities of a case, and what it differs from another by."""
        found, other = (
            self._cells.value(f"{self._layers} {each.name}", lambda each=each: self._refitted(each))
            for each in (case, than)
        )
        row = {key: value for key, value in found.items() if key != "nats"}
        return row | {"than": than.name, "kinds": compared(found["nats"], other["nats"])}

    def _refitted(self, case: Case) -> Any:
        options = {"step_size": case.step_size, "ridge": case.ridges, "where": case.where}
        options |= {"lost": case.lost, "held": self._held, "progress": False}
        with original_once(self._originals[case.where]), ExitStack() as stack:
            rule = property(lambda sums: case.times * len(sums._gram) / sums.tokens)
            stack.enter_context(patch.object(NormalEquations, "usual_ridge", rule))
            if case.maps is not None:
                stack.enter_context(realigned(0.5, case.maps))
            found = refit.fit(self._short, self._layers, self._fitted, **options)
        restored = [fit.restored_held for fit in found.fits]
        return {
            "nats": self._pruned(found),
            "ridges": dict(Counter(f"{fit.ridge}" for fit in found.fits)),
            "restored_held": sum(restored) / len(restored),  # locally, by the mean matrix
        }

    def _pruned(self, found: refit.Refit | None = None) -> dict[str, list[tuple[float, int]]]:
        with self._short.without_layers(self._layers):
            undo = None if found is None else refit.fold(self._short, found)
            try:
                return self._nats(self._start, len(self._short.present))
            finally:
                if undo is not None:
                    undo()

    def _nats(self, start: int, count: int) -> dict[str, list[tuple[float, int]]]:
        """Nats and tokens of every window, by its kind; layers before ``start`` run once."""
        decoder, found = self._short.decoder, {}
        model = PartialRun(decoder)
        for kind, read in self._kinds.items():
            padded = [pad([window], decoder) for window in read]
            states: list[Tensor] | list[None] = [None] * len(read)
            if start:
                if kind not in self._entering:
                    run = range(start)
                    self._entering[kind] = [model.advance(t, run, None) for t, _ in padded]
                states = self._entering[kind]
            run = range(start, count)
            found[kind] = [
                (model.nats(tokens, mask, run, state), tokens.shape[1] - 1)
                for (tokens, mask), state in zip(padded, states, strict=True)
            ]
        return found


Originals = dict[int, tuple[list[Tensor], list[Tensor]]]


@contextmanager
def original_once(known: Originals) -> Iterator[None]:
    """Inside the block the original model's states, by layer, are those of the first refit."""
    run_all, run_original = Batches.run_all, LayerRefit.run_original

    def layer(self: Batches, index: int, source: HiddenStates, target: HiddenStates) -> None:
        if index not in known:
            run_all(self, index, source, target)
            known[index] = [target[batch].clone() for batch in self], []
        for batch in self:
            target[batch] = known[index][0][batch].clone()

    def sublayers(self: LayerRefit) -> None:
        batches, index = self._batches, self._index
        if index not in known:
            run_original(self)
            kept = (self._target, self._between if "attention" in self.projections else ())
            known[index] = tuple(
                [each[batch].clone() for batch in batches if each] for each in kept
            )
        sample = self._entering[0]
        self._between = batches.states(sample.shape[-1], sample.dtype, "between")
        for batch in batches:
            for states, kept in zip((self._target, self._between), known[index], strict=True):
                if kept:  # no state between sublayers where the attention cannot be solved
                    states[batch] = kept[batch].clone()

    originals = patch.object(LayerRefit, "run_original", sublayers)
    with patch.object(Batches, "run_all", layer), originals:
        yield


def losses_of(rows: Sequence[tuple[float, int]]) -> list[Perplexity]:
    return [Perplexity.of([Sample(None, nats, tokens)]) for nats, tokens in rows]


def perplexities(nats: Mapping[str, Any]) -> dict[str, float]:
    return {kind: combined(losses_of(rows)).value for kind, rows in nats.items()}


def compared(nats: Mapping[str, Any], than: Mapping[str, Any]) -> dict[str, Any]:
    """By kind and over all kinds: perplexity, and nats less or more than another's, paired.

    Over all kinds the error is that of a sample with the kinds as strata.
    """
    result, strata, every = {}, [], []
    for kind, rows in nats.items():
        ours = losses_of(rows)
        by = difference(losses_of(than[kind]), ours)
        result[kind] = {"perplexity": combined(ours).value, "nats": by.nats}
        result[kind]["standard_error"] = by.standard_error
        if kind != HELD:
            strata.append((by, combined(ours).tokens))
            every += ours
    tokens = sum(own for _, own in strata)
    over_all = {"perplexity": combined(every).value}
    over_all["nats"] = sum(by.nats * own for by, own in strata) / tokens
    over_all["standard_error"] = (
        math.hypot(*(by.standard_error * own for by, own in strata)) / tokens
    )
    return {**result, "all three kinds": over_all}


def line(*parts: Any) -> str:
    *names, row = parts
    texts = [
        f"{kind} {found['perplexity']:.2f} {found['nats']:+.4f} ({found['standard_error']:.4f})"
        for kind, found in row["kinds"].items()
    ]
    return f"{': '.join(names):<48} " + "; ".join(texts)


if __name__ == "__main__":
    fire.Fire(main)

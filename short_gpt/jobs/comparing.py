"""Methods compared on one model: what each removal costs, and what healing restores.

Everything is measured once: scores come from one pass, the list of a search begins with those of
all smaller numbers, and a set of layers that several methods choose is healed and evaluated once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import torch

from llama.files import JsonObject
from short_gpt.data.disjoint import check_disjoint
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import Perplexity, combined, difference
from short_gpt.evaluation.tasks import TaskRun, TaskSuite, task_changes
from short_gpt.healing import HealedChoice, PatchSettings, choose_healed
from short_gpt.healing.choosing import pruned_losses
from short_gpt.healing.refit import RefitSettings
from short_gpt.jobs.cases import PATCHED, RAW, REFIT, Cases, MethodAgreement, Row, Windows
from short_gpt.jobs.costs import size_without, tokens_per_second
from short_gpt.runtime.digest import json_digest, windows_digest
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile, joined
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import spearman
from short_gpt.scoring.run import RunState
from short_gpt.selection.methods import AUTO, BY_LOSS, choose
from short_gpt.selection.search import Search
from short_gpt.wrappers.short_model import ShortModel

# identifies a tokenizer by its ids: letters of several scripts, digits, signs and spaces
PROBE = "".join(map(chr, [*range(32, 127), *range(161, 1424), *range(8192, 8448)]))
PROBE += " 1,234,567 ordinary words; naturally, unbelievable internationalization.\n\n"
Heal = Callable[[list[int]], list[Perplexity]]
Case = tuple[str, int | None, int]  # method, seed of a random one, number of layers


@dataclass(frozen=True)
class ComparisonResult:
    """What `compare` gives."""

    rows: list[Row]  # the original model first, then a row for every case
    agreement: list[MethodAgreement]  # of bi, angular and sleb, by number of layers, with sleb
    # metrics without healing, by the layers removed, and their changes from the original model with
    # errors, as "piqa acc change" and "piqa acc change_stderr"
    tasks: dict[str, dict[str, float]]
    counts: Sequence[int] = ()  # numbers of layers that were compared
    state: StateFile | None = None  # holds what was measured, to be cleared once the result is safe
    bos: str = "first"  # which windows began with it: first of each text, or every
    precision: Mapping[str, str] | None = None  # `ScoredModel.about_precision`
    choices: Mapping[int, HealedChoice] = field(default_factory=dict)  # of auto, by how many

    @property
    def chosen(self) -> list[str]:
        """How auto chose, one text for every number of layers."""
        return [
            f"auto, {n} layers: {choice.layers}\n{choice}" for n, choice in self.choices.items()
        ]

    def to_dict(self) -> dict[str, object]:
        """All except the state, ready for JSON."""
        left_out = ("state", "precision", "counts")  # counts are an argument of the command
        own = {k: value for k, value in vars(self).items() if k not in left_out}
        own |= {"choices": {n: choice.to_dict() for n, choice in self.choices.items()}}
        return {**own, **(self.precision or {}), "rows": [asdict(row) for row in self.rows]}


def compare(
    short: ShortModel,
    calibration: Windows,
    evaluation: Windows,
    *,
    cases: Cases = Cases(),
    tasks: TaskSuite | None = None,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> ComparisonResult:
    """Compares methods on one model: perplexity, size and speed without the layers, healed or not.

    Args:
        short: the original model, which stays unchanged.
        calibration: windows of token ids that choose layers and that refits are fitted on.
        evaluation: windows of other text.
        cases: what is compared.
        tasks: also run on the models without healing.
        state: file that the run is saved in, to be continued, until ``result.state.clear()``.

    Raises:
        ShortGPTError: a setting is refused, calibration and evaluation share text, or the state is
            of another run.

    Example:
        >>> cases = Cases(["bi", "angular"], [4, 8], healings=["raw", "refit"])
        >>> result = compare(short, calibration, held_out, cases=cases)  # doctest: +SKIP
        >>> print(tables.compared(result.rows))  # doctest: +SKIP
    """
    cases = cases.within(len(short.kept))
    if tasks is not None:
        tasks.check()
    saved = None
    if state is not None:
        windows = {"calibration": calibration, "evaluation": evaluation}
        identity = joined(
            short.identity(),
            {name: windows_digest(own) for name, own in windows.items()},
            {"search_windows": cases.search_windows},
            {"refit": vars(RefitSettings()), "patch": vars(PatchSettings())},
        )
        saved = StateFile(state, identity)
    few = cases.search_windows
    comparison = Comparison(short, calibration, evaluation, few=few, state=saved, progress=progress)
    rows = comparison.rows(cases)
    searched = cases.numbers if "sleb" in cases.names else ()
    agreement = [comparison.agreement(n, max(cases.numbers)) for n in searched]
    metrics = {}
    if tasks is not None:  # which depend on the tokenizer too
        suite = json_digest([tasks.identity(), short.encode(PROBE)])
        metrics = comparison.tasks(rows, partial(tasks.documents, short), suite)
    chosen = {n: comparison.choice(n) for n in (cases.numbers if AUTO in cases.names else ())}
    return ComparisonResult(rows, agreement, metrics, cases.numbers, saved, choices=chosen)


class Comparison:
    """What `compare` does, step by step; searches by loss read ``few`` calibration windows."""

    def __init__(
        self,
        short: ShortModel,
        calibration: Windows,
        evaluation: Windows,
        *,
        few: int = 4,
        budget: int | None = None,
        state: StateFile | None = None,
        progress: bool = True,
    ) -> None:
        check_disjoint(calibration, evaluation)
        self.short, self._calibration, self._evaluation = short, calibration, evaluation
        self._few, self.cells, self._progress = calibration[:few], Cells(state), progress
        self._budget = budget  # of auto, in bare passes
        self._raw = partial(pruned_losses, short, evaluation=evaluation)
        self._refitted = partial(self._raw, fit_on=calibration, progress=progress)

    def rows(self, cases: Cases) -> list[Row]:
        """Measures every method x number of layers x healing, and the original model first.

        A set has no row for a way in which it cannot be healed.
        """
        counts = cases.within(len(self.short.kept)).numbers
        heals: dict[str, Heal] = {
            RAW: self._raw,
            PATCHED: partial(self._refitted, settings=PatchSettings()),
            REFIT: self._refitted,
        }
        every: list[Case] = [
            (method, seed, n)
            for method in cases.names
            for seed in (range(cases.seeds) if method == "random" else [None])
            for n in counts
        ]
        sets = [self.layers(method, n, seed or 0, most=max(counts)) for method, seed, n in every]
        rows = [self._row(("dense", None, 0), [], RAW, self._raw)]
        count = len(every) * len(cases.heals)
        with bar("comparing", total=count, unit="model", show=self._progress) as shown:
            for healing in cases.heals:
                for case, layers in zip(every, sets, strict=True):
                    shown.update()
                    if healing != PATCHED or 0 not in layers:  # a patch needs a layer before it
                        rows.append(self._row(case, layers, healing, heals[healing]))
        return rows

    def layers(self, method: str, n: int, seed: int = 0, *, most: int | None = None) -> list[int]:
        """The n layers that a method removes; searches go on to ``most`` right away."""
        if method == AUTO:
            return self.choice(n).layers
        if method in BY_LOSS:
            return self._search(method, most or n).removed[:n]
        return choose(self.importance, n, method=method, seed=seed)

    @property
    def importance(self) -> Importance:
        """Scores of the calibration windows."""
        return self._scored("importance", self._calibration)

    def _scored(self, name: str, windows: Windows) -> Importance:
        """Scores of some windows; the model keeps its own scores."""

        def measure(part: StateFile | None) -> dict[str, object]:
            before, self.short.importance = self.short.importance, Importance.empty(self.short.kept)
            state = None if part is None else RunState(part)
            try:
                show = self._progress
                self.short.measure(windows, state=state, all_tokens=True, progress=show)
                return self.short.importance.to_dict()
            finally:
                self.short.importance = before

        return Importance.from_dict(self.cells.resumed(name, measure))

    def _search(self, method: str, n: int) -> Search:
        def measure(part: StateFile | None) -> JsonObject:
            show = self._progress
            result = self.short.search(self._few, n, method=method, state=part, progress=show)
            return {"removed": result.removed, "losses": result.losses}

        content = self.cells.resumed(f"{method} {n}", measure)
        # JSON's keys are strings
        trials = [{int(i): v for i, v in loss.items()} for loss in content["losses"]]
        return Search(content["removed"], trials)

    def choice(self, n: int) -> HealedChoice:
        """What auto chose, and how."""

        def measure(part: StateFile | None) -> JsonObject:
            options: dict[str, Any] = {"state": part, "progress": self._progress}
            options["budget"] = self._budget
            return choose_healed(self.short, self._calibration, n, **options).to_dict()

        return HealedChoice.from_dict(self.cells.resumed(f"{AUTO} {n}", measure))

    def agreement(self, n: int, most: int) -> MethodAgreement:
        """How far bi, angular and sleb, which searches to ``most`` layers, agree on n layers."""
        few = self._scored("importance of few", self._few)
        sets = {method: {*choose(few, n, method=method)} for method in ("bi", "angular")}
        sets["sleb"] = {*self.layers("sleb", n, most=most)}
        shared = {f"{a}, {b}": len(sets[a] & sets[b]) / n for a, b in combinations(sets, 2)}
        alone = self._search("sleb", most).losses[0]
        scores = few.block_influence[[few.layers.index(i) for i in alone]]
        correlation = spearman(scores, torch.tensor(list(alone.values())).double())
        return {"n": n, "overlap": shared, "rank_correlation_of_bi_with_loss": correlation}

    def tasks(
        self, rows: Sequence[Row], run: Callable[[], TaskRun], suite: str = ""
    ) -> dict[str, dict[str, float]]:
        """What ``run`` gives for the models without healing, by the layers, as in ``"[3, 4]"``.

        ``suite`` tells the tasks from others, whose results a state holds too.
        """

        def documents(layers: list[int]) -> TaskRun:
            def measure() -> JsonObject:
                with self.short.without_layers(layers):
                    return vars(run())

            return TaskRun.from_dict(self.cells.value(f"documents {suite} {layers}", measure))

        original = documents([])
        sets = [sorted(row.layers) for row in rows if row.healing == RAW]
        runs = {str(layers): documents(layers) for layers in sets}
        changes = {name: task_changes(original, own) for name, own in runs.items() if name != "[]"}
        return {name: own.named() | changes.get(name, {}) for name, own in runs.items()}

    def _row(self, case: Case, layers: list[int], healing: str, heal: Heal) -> Row:
        method, seed, n = case
        dense, raw = self._losses(RAW, [], self._raw), self._losses(RAW, layers, self._raw)
        healed = self._losses(healing, layers, heal)
        change, gain = difference(dense, healed), difference(raw, healed)
        parameters, size = size_without(self.short, layers)
        return Row(
            method=method,
            seed=seed,
            n=n,
            healing=healing,
            layers=layers,
            perplexity=combined(healed).value,
            nats=change.nats,
            standard_error=change.standard_error if n else 0.0,
            gain=None if healing == RAW else gain.nats,
            gain_error=None if healing == RAW else gain.standard_error,
            parameters=parameters,
            megabytes=size / 1e6,
            tokens_per_second=self._speed(n, layers),
            windows=change.windows,
            texts=change.texts,
        )

    def _losses(self, healing: str, layers: list[int], heal: Heal) -> list[Perplexity]:
        return self.cells.perplexities(f"{healing} {sorted(layers)}", partial(heal, layers))

    def _speed(self, n: int, layers: list[int]) -> float:
        def measure() -> float:
            with self.short.without_layers(layers):
                return tokens_per_second(self.short, self._evaluation[0])

        return float(self.cells.value(f"speed {n}", measure))

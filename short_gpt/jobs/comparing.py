"""Methods against each other on one model: what each removal costs, and what healing brings back.

Everything is measured once: scores come from one pass, a search's list holds those of all smaller
numbers, and a set of layers that several methods choose is healed and evaluated once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from llama.io.json_files import JsonObject
from short_gpt.data.disjoint import check_disjoint
from short_gpt.evaluation.paired import difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.tasks import TaskRun, TaskSuite, task_changes
from short_gpt.healing import PatchSettings, RefitSettings, refit
from short_gpt.jobs.cases import Cases
from short_gpt.jobs.cells import Cells, size_without, tokens_per_second
from short_gpt.jobs.rows import (
    DISTILL,
    LORA,
    PATCHED,
    RAW,
    REFIT,
    TRAINED,
    Agreement,
    Row,
    Windows,
)
from short_gpt.models.numbering import check_count
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile, joined
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import spearman
from short_gpt.selection.methods import BY_LOSS, check_method, choose
from short_gpt.selection.search import Search
from short_gpt.wrappers.short_model import ShortModel

# by whose token ids a tokenizer is known: letters of several scripts, digits, signs and spaces
PROBE = "".join(map(chr, [*range(32, 127), *range(161, 1424), *range(8192, 8448)]))
PROBE += " 1,234,567 ordinary words; naturally, unbelievable internationalization.\n\n"
Heal = Callable[[list[int]], list[Perplexity]]
Case = tuple[str, int | None, int]  # method, seed of a random one, number of layers


@dataclass(frozen=True)
class Compared:
    """What `compare` gives.

    Attributes:
        rows: the original model first, then a row for every case.
        agreement: of Block Influence, angle and greedy search, for every number of layers; empty
            without the greedy search.
        tasks: metrics of the models without healing, by the layers removed, and how much each
            changed from the original model, with its error paired over the documents, as in "piqa
            acc change" and "piqa acc change_stderr"; empty without tasks.
        state: the file that holds what was measured, to be cleared once the result is safe.
        bos: which windows began with it: first of each text, or every.
    """

    rows: list[Row]
    agreement: list[Agreement]
    tasks: dict[str, dict[str, float]]
    state: StateFile | None = None
    bos: str = "first"

    def to_dict(self) -> dict[str, object]:
        """All but the state, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        found = {"rows": rows, "agreement": self.agreement, "tasks": self.tasks}
        return {**found, "bos": self.bos}


class Healing(Protocol):
    """A healing that `compare` calls for each set of layers, such as `LoraHealing`."""

    def __call__(self, layers: list[int], work_dir: Path | None = None) -> list[Perplexity]:
        """Losses of the evaluation windows of the model without these layers, healed.

        Args:
            layers: original numbers.
            work_dir: where it may keep what an interruption must not lose, and continue from.
        """

    def identity(self) -> Mapping[str, object]:
        """What its results depend on, ready for JSON."""


DEFAULT_CASES = Cases()


def compare(
    short: ShortModel,
    calibration: Windows,
    evaluation: Windows,
    *,
    cases: Cases = DEFAULT_CASES,
    lora: Healing | None = None,
    distill: Healing | None = None,
    tasks: TaskSuite | None = None,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> Compared:
    """Compares methods on one model: perplexity, size and speed without the layers, healed or not.

    Args:
        short: the original model; it is left as it was.
        calibration: windows of token ids that choose layers and that refits are fitted on.
        evaluation: windows of other text.
        cases: what is set side by side.
        lora, distill: heal for these healings.
        tasks: also run on the models without healing.
        progress: whether to show bars.
        state: file that the run is saved in; it continues there after an interruption.

    Returns:
        Rows, agreement and metrics. The state file stays until ``result.state.clear()``.

    Raises:
        ShortGPTError: a method, healing or task is unknown, a number out of range, calibration and
            evaluation share text, or the state is of another run.

    Example:
        >>> cases = Cases(["bi", "angular"], [4, 8], healings=["raw", "refit"])
        >>> result = compare(short, calibration, held_out, cases=cases)  # doctest: +SKIP
        >>> print(tables.compared(result.rows))  # doctest: +SKIP
    """
    heals = _heals(cases, {LORA: lora, DISTILL: distill})
    if tasks is not None:
        tasks.check()
    texts = {"calibration": calibration, "evaluation": evaluation}
    kept = None if state is None else StateFile(state, _identity(short, texts, cases, heals))
    few = cases.search_windows
    comparison = Comparison(short, calibration, evaluation, few=few, state=kept, progress=progress)
    rows = comparison.rows(
        cases.names,
        cases.numbers,
        healings=cases.heals,
        seeds=cases.seeds,
        trained={name: _beside(name, heal, kept) for name, heal in heals.items()},
        lora_only=cases.pairs,
    )
    most = max(cases.numbers)
    searched = cases.numbers if "sleb" in cases.names else ()
    agreement = [comparison.agreement(n, most) for n in searched]
    metrics = {}
    if tasks is not None:
        run = partial(tasks.documents, short)
        metrics = comparison.tasks(rows, run, _suite(tasks, short))
    return Compared(rows, agreement, metrics, kept)


def _heals(cases: Cases, given: Mapping[str, Healing | None]) -> dict[str, Healing]:
    """What heals by training; ShortGPTError where a case lacks it."""
    heals = {name: heal for name, heal in given.items() if heal is not None}
    if lacks := [name for name in cases.heals if name in TRAINED and name not in heals]:
        kind = f"{lacks[0].capitalize()}Healing"
        raise ShortGPTError(f"the healing {lacks[0]} needs what heals: pass {lacks[0]}={kind}(...)")
    return heals


def _identity(
    short: ShortModel, texts: Mapping[str, Windows], cases: Cases, heals: Mapping[str, Healing]
) -> dict[str, object]:
    """What the results rest on: weights, windows, and the settings that change a cell."""
    digests = {name: json_digest([list(w) for w in windows]) for name, windows in texts.items()}
    settings = {"search_windows": cases.search_windows}
    healing = {name: dict(heals[name].identity()) if name in heals else None for name in TRAINED}
    return joined(short.identity(), digests, settings, healing)


def _beside(
    name: str, healing: Healing, state: StateFile | None
) -> Callable[[list[int]], list[Perplexity]]:
    """The healing, with a folder beside the state for each set of layers."""

    def heal(layers: list[int]) -> list[Perplexity]:
        if state is None:
            return healing(layers)
        numbers = "-".join(map(str, sorted(layers)))
        return healing(layers, state.path.with_name(f"{state.path.name}.{name}-{numbers}"))

    return heal


def _suite(tasks: TaskSuite, short: ShortModel) -> str:
    """A name for what a suite's metrics depend on, the tokenizer included."""
    return json_digest([asdict(tasks), short.encode(PROBE)])


class Comparison:
    """Compares methods on one model.

    Args:
        short: the original model; it is left as it was.
        calibration: windows of token ids that choose layers and that refits are fitted on.
        evaluation: windows of other text.
        few: how many of the calibration windows the searches by loss read.
        state: saves what was measured and continues from it.
        progress: whether to show bars.

    Raises:
        ShortGPTError: calibration and evaluation share text.
    """

    def __init__(
        self,
        short: ShortModel,
        calibration: Windows,
        evaluation: Windows,
        *,
        few: int = 4,
        state: StateFile | None = None,
        progress: bool = True,
    ) -> None:
        check_disjoint(calibration, evaluation)
        self.short, self._calibration, self._evaluation = short, calibration, evaluation
        self._few, self._cells, self._progress = calibration[:few], Cells(state), progress

    def rows(
        self,
        methods: Sequence[str],
        counts: Sequence[int],
        *,
        healings: Sequence[str] = (RAW,),
        seeds: int = 3,
        trained: Mapping[str, Heal] | None = None,
        lora_only: Collection[tuple[str, int]] | None = None,
    ) -> list[Row]:
        """Measures every method x number of layers x healing, and the original model first.

        Args:
            methods: names of `methods.METHODS`; ``random`` is drawn ``seeds`` times.
            counts: numbers of layers to remove.
            healings: of `rows.HEALINGS`. Sets that cannot be healed so have no such row.
            seeds: how many random sets for every number.
            trained: what heals for lora and distill: it gives the loss of every evaluation window
                of the model without these layers, healed.
            lora_only: the methods and numbers to heal so, which takes far longer than all the
                rest; None means all.

        Raises:
            ShortGPTError: a method is unknown, a number out of range, or nothing heals by lora.
        """
        heals = {PATCHED: self._patched, REFIT: self._refitted, **(trained or {})}
        if lacks := [h for h in healings if h in TRAINED and h not in heals]:
            raise ShortGPTError(f"the healing {lacks[0]} needs what heals: pass trained=...")
        cases = self._cases(methods, counts, seeds)
        sets = [self.layers(method, n, seed or 0, most=max(counts)) for method, seed, n in cases]
        few = {(m, n) for m, _, n in cases} if lora_only is None else set(lora_only)
        rows = [self._row(("dense", None, 0), [], RAW)]
        count = len(cases) * len(healings)
        with bar("comparing", total=count, unit="model", show=self._progress) as shown:
            for healing in healings:
                for case, layers in zip(cases, sets, strict=True):
                    shown.update()
                    if healing in TRAINED and (case[0], case[2]) not in few:
                        continue
                    if healing != PATCHED or 0 not in layers:  # a patch needs a layer before it
                        rows.append(self._row(case, layers, healing, heals.get(healing)))
        return rows

    def _cases(self, methods: Sequence[str], counts: Sequence[int], seeds: int) -> list[Case]:
        for method in methods:
            check_method(method)
        for n in counts:
            check_count(n, len(self.short.kept), name="counts")
        return [
            (method, seed, n)
            for method in methods
            for seed in (range(seeds) if method == "random" else [None])
            for n in counts
        ]

    def layers(self, method: str, n: int, seed: int = 0, *, most: int | None = None) -> list[int]:
        """The n layers that a method removes; searches go on to ``most`` at once."""
        if method in BY_LOSS:
            return self._search(method, most or n).removed[:n]
        return choose(self.importance, n, method=method, seed=seed)

    @property
    def importance(self) -> Importance:
        """Scores of the calibration windows."""
        return self._scored("importance", self._calibration)

    def _scored(self, name: str, windows: Windows) -> Importance:
        """Scores of some windows; the model keeps those that it has."""

        def measure() -> dict[str, object]:
            before, self.short.importance = self.short.importance, Importance.empty(self.short.kept)
            try:
                self.short.measure(windows, all_tokens=True, progress=self._progress)
                return self.short.importance.to_dict()
            finally:
                self.short.importance = before

        return Importance.from_dict(self._cells.value(name, measure))

    def _search(self, method: str, n: int) -> Search:
        name = f"{method} {n}"

        def measure() -> JsonObject:
            part = self._cells.inner(name.replace(" ", "-"))
            result = self.short.search(
                self._few, n, method=method, state=part, progress=self._progress
            )
            finished.append(part)
            return {"removed": result.removed, "losses": result.losses}

        finished: list[StateFile | None] = []
        content = self._cells.value(name, measure)
        for part in filter(None, finished):  # now that its result is saved
            part.clear()
        # JSON's keys are texts
        trials = [{int(i): v for i, v in loss.items()} for loss in content["losses"]]
        return Search(content["removed"], trials)

    def agreement(self, n: int, most: int) -> Agreement:
        """Whether the cheap rankings hold: Block Influence, angle and greedy search, all on the
        windows that the searches read.

        Args:
            n: how many layers each removes.
            most: the largest number of the comparison, up to which the search goes.
        """
        few = self._scored("importance of few", self._few)
        sets = {m: set(choose(few, n, method=m)) for m in ("bi", "angular")}
        sets["sleb"] = set(self.layers("sleb", n, most=most))
        pairs = (("bi", "angular"), ("bi", "sleb"), ("angular", "sleb"))
        shared = {f"{a}, {b}": len(sets[a] & sets[b]) / n for a, b in pairs}
        alone = self._search("sleb", most).losses[0]
        scores = few.block_influence
        correlation = spearman(scores[list(alone)], torch.tensor(list(alone.values())).double())
        return {"n": n, "overlap": shared, "rank_correlation_of_bi_with_loss": correlation}

    def tasks(
        self, rows: Sequence[Row], run: Callable[[], TaskRun], suite: str = ""
    ) -> dict[str, dict[str, float]]:
        """What a task suite gives for the models without healing.

        Args:
            rows: from `rows`.
            run: scores the model as it is at the call.
            suite: tells the suite from others, whose results a state holds too.

        Returns:
            Results by the layers removed, as in ``"[3, 4]"``, with their changes from the
            original model, paired over the documents.
        """

        def found(layers: list[int]) -> TaskRun:
            with self.short.without_layers(layers):
                return run()

        def kept(layers: list[int]) -> TaskRun:
            cell = f"documents {suite} {layers}"
            return TaskRun(**self._cells.value(cell, lambda: vars(found(layers))))

        whole = kept([])
        sets = [sorted(row.layers) for row in rows if row.healing == RAW]
        every = {str(layers): kept(layers) for layers in sets}
        changes = {name: task_changes(whole, done) for name, done in every.items() if name != "[]"}
        return {name: done.named() | changes.get(name, {}) for name, done in every.items()}

    def _row(self, case: Case, layers: list[int], healing: str, heal: Heal | None = None) -> Row:
        method, seed, n = case
        dense, raw = self._measured(RAW, []), self._measured(RAW, layers)
        parts = raw if healing == RAW else self._measured(healing, layers, heal)
        change, gain = difference(dense, parts), difference(raw, parts)
        parameters, size = size_without(self.short, layers)
        return Row(
            method=method,
            seed=seed,
            n=n,
            healing=healing,
            layers=layers,
            perplexity=together(parts).value,
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

    def _measured(
        self, healing: str, layers: list[int], heal: Heal | None = None
    ) -> list[Perplexity]:
        """Losses of the evaluation windows, measured once for every set of layers.

        Args:
            heal: measures the healed model without them; raw ones are measured here.
        """
        measure = partial(heal or self._losses, layers)
        return self._cells.losses(f"{healing} {sorted(layers)}", measure)

    def _losses(self, layers: list[int]) -> list[Perplexity]:
        with self.short.without_layers(layers):
            return losses(self.short.decoder, self._evaluation, progress=False)

    def _patched(self, layers: list[int]) -> list[Perplexity]:
        return self._refitted(layers, PatchSettings())

    def _refitted(
        self, layers: list[int], settings: RefitSettings | None = None
    ) -> list[Perplexity]:
        fitted_on, show = self._calibration, self._progress
        result = refit.fit(self.short, layers, fitted_on, settings=settings, progress=show)
        with self.short.without_layers(layers):
            undo = refit.fold(self.short, result)
            try:
                return losses(self.short.decoder, self._evaluation, progress=False)
            finally:
                undo()

    def _speed(self, n: int, layers: list[int]) -> float:
        def measure() -> float:
            with self.short.without_layers(layers):
                return tokens_per_second(self.short, self._evaluation[0])

        return float(self._cells.value(f"speed {n}", measure))

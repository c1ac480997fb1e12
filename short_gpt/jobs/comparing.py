"""Methods x numbers of layers x healing on one model, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.tasks import TaskSuite
from short_gpt.jobs.comparison_cells import Comparison
from short_gpt.jobs.rows import (
    DISTILL,
    LORA,
    RAW,
    TRAINED,
    Agreement,
    Row,
    Windows,
    check_healing,
)
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile, joined
from short_gpt.selection.methods import check_method
from short_gpt.wrappers.short_model import ShortModel

# by whose token ids a tokenizer is told: letters of several scripts, digits, signs and spaces
PROBE = "".join(map(chr, [*range(32, 127), *range(161, 1424), *range(8192, 8448)]))
PROBE += " 1,234,567 ordinary words; naturally, unbelievable internationalization.\n\n"
DEFAULT_METHODS = (
    "bi",
    "angular",
    "deepest",
    "relative_magnitude",
    "perplexity",
    "sleb",
    "reverse",
    "random",
)


@dataclass(frozen=True)
class Cases:
    """What is set side by side: every method x number of layers x healing.

    Attributes:
        methods: names of `selection.METHODS`.
        counts: numbers of layers to remove.
        healings: of raw, refit, lora and distill.
        seeds: random sets for every number, if "random" is among the methods.
        search_windows: how many of the calibration windows the searches by loss read.
        lora_only: methods and numbers to heal by lora or distill, as in ``[("bi", 8)]``; None
            means all.

    Raises:
        ShortGPTError: a name is unknown or named twice, a number no whole one of at least 1.
    """

    methods: Sequence[str] = DEFAULT_METHODS
    counts: Sequence[int] = (2, 4, 8, 12)
    healings: Sequence[str] = (RAW,)
    seeds: int = 3
    search_windows: int = 4
    lora_only: Collection[tuple[str, int]] | None = None

    def __post_init__(self) -> None:
        for method in self.methods:
            check_method(method)
        _check_each_once("methods", self.methods)
        _check_each_once("counts", self.counts)
        _check_each_once("healing", self.healings)
        for n in self.counts:
            _check_whole("counts", n)
        _check_whole("seeds", self.seeds)
        _check_whole("search_windows", self.search_windows)
        self._check_healings()

    def _check_healings(self) -> None:
        for healing in self.healings:
            check_healing(healing)
        if self.lora_only is None:
            return
        if not {*TRAINED} & {*self.healings}:
            raise ShortGPTError(
                "lora_only is for the healing lora or distill; add one, or leave this out"
            )
        every = [(method, n) for method in self.methods for n in self.counts]
        if strange := [case for case in self.lora_only if tuple(case) not in every]:
            raise ShortGPTError(
                f"lora_only {strange[0]}: expected a method and a number of those compared, "
                f"as in {every[0]}"
            )


def _check_whole(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ShortGPTError(f"{name} = {value!r}: expected whole numbers of at least 1")


def _check_each_once(name: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) < len(values):
        raise ShortGPTError(f"{name} = {list(values)}: expected at least one, and each once")


@dataclass(frozen=True)
class Compared:
    """What `compare` gives.

    Attributes:
        rows: the whole model first, then a row for every case.
        agreement: of Block Influence, angle and greedy search, for every number of layers; empty
            without the greedy search.
        tasks: metrics of the models without healing, by the layers removed, and how much each
            changed from the whole model, with its error paired over the documents, as in "piqa acc
            change" and "piqa acc change_stderr"; empty without tasks.
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
        short: the whole model; it is left as it was.
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
        cases.methods,
        cases.counts,
        healings=cases.healings,
        seeds=cases.seeds,
        trained={name: _beside(name, heal, kept) for name, heal in heals.items()},
        lora_only=cases.lora_only,
    )
    most = max(cases.counts)
    searched = cases.counts if "sleb" in cases.methods else ()
    agreement = [comparison.agreement(n, most) for n in searched]
    metrics = {}
    if tasks is not None:
        run = partial(tasks.documents, short)
        metrics = comparison.tasks(rows, run, _suite(tasks, short))
    return Compared(rows, agreement, metrics, kept)


def _heals(cases: Cases, given: Mapping[str, Healing | None]) -> dict[str, Healing]:
    """What heals by training; ShortGPTError where a case lacks it."""
    heals = {name: heal for name, heal in given.items() if heal is not None}
    if lacks := [name for name in cases.healings if name in TRAINED and name not in heals]:
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

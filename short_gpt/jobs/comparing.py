"""Methods compared on one model: what each removal costs, and what healing restores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from short_gpt.costs.sizes import size_without
from short_gpt.evaluation.perplexity import combined, difference
from short_gpt.healing import HealedChoice
from short_gpt.healing.choosing import TRIAL_WINDOWS
from short_gpt.healing.context import TokenWindows
from short_gpt.healing.job import CLOSED, HEALINGS, RAW, STEPS
from short_gpt.healing.sets import LayerSets
from short_gpt.healing.settings import COMPARED, Cases
from short_gpt.jobs.inputs import SIZE, WindowSettings, check_model
from short_gpt.jobs.saving import Running, interruptible
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.progress import bar, check_alone
from short_gpt.runtime.state import StateFile, joined
from short_gpt.selection.methods import AUTO
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_model import ShortModel

SEEDS = 3  # random sets for every number of layers


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    method: str  # that chose the layers
    seed: int | None  # of the random method; None for all others
    n: int  # layers removed
    healing: str  # raw, patch or refit
    layers: list[int]  # removed, original numbers
    perplexity: float  # on the evaluation text
    nats: float  # mean loss minus that of the original model, paired over the windows
    standard_error: float  # of nats; 0 for the original model
    gain: float | None  # mean loss minus that of the raw model; None for a raw one
    gain_error: float | None  # standard error of gain
    parameters: int  # of the model without the layers
    megabytes: float  # of its weights
    windows: int = 0  # that the errors are over
    texts: int | None = None  # of the windows; see `evaluation.Difference`
    kld: float | None = None  # KL divergence from the original, nats a token; None if streamed
    kld_error: float | None = None  # standard error of kld
    same_top: float | None = None  # share of tokens whose likeliest token is the original's


@dataclass(frozen=True)
class ComparisonResult:
    """What `compare` gives."""

    rows: list[Row]  # the original model first, then a row for every case
    counts: Sequence[int] = ()  # numbers of layers that were compared
    state: StateFile | None = None  # holds what was measured, to be cleared once the result is safe
    bos: str = "first"  # which windows began with it: first of each text, or every
    precision: Mapping[str, str] | None = None  # `ScoredModel.about_precision`
    choices: Mapping[int, HealedChoice] = field(default_factory=dict)  # of auto, by how many

    def to_dict(self) -> dict[str, object]:
        """The result, ready for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "bos": self.bos,
            "choices": {n: choice.to_dict() for n, choice in self.choices.items()},
            **(self.precision or {}),
        }


def compare(
    short: ShortModel,
    calibration: TokenWindows,
    evaluation: TokenWindows,
    *,
    method: str | Sequence[str] = COMPARED,
    n: object = Cases.n,
    heal_by: str | Sequence[str] = RAW,
    search_windows: int = TRIAL_WINDOWS,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> ComparisonResult:
    """Compares methods on one model: perplexity and size without the layers, healed or not.

    Args:
        short: The original model, which stays unchanged.
        calibration: Windows of token ids that choose layers and that closed forms are fitted on.
        evaluation: Windows of other text.
        method: Names of methods. Default: all that need no refit.
        n: Numbers of layers to remove. Default: those of 2, 4, 8 and 12 that the model allows.
        heal_by: Some of raw, patch and refit. Default: raw.
        search_windows: Calibration windows that the searches by loss read. Default: 4.
        progress: Show bars. Default: True.
        state: File that the run is saved in and continued from, until ``result.state.clear()``.

    Raises:
        ShortGPTError: a setting is refused, calibration and evaluation share text, or the state is
            of another run.

    Example:
        >>> result = compare(short, calibration, held_out, method="bi", n=4)  # doctest: +SKIP
        >>> print(tables.compared(result.rows))  # doctest: +SKIP
    """
    cases = Cases(method, n, heal_by)
    cases.check(HEALINGS)
    cases = cases.within(len(short.kept))
    saved = None
    if state is not None:
        identity = joined(
            short.identity(),
            {"calibration": windows_digest(calibration), "evaluation": windows_digest(evaluation)},
            {"search_windows": search_windows},
            {name: vars(STEPS[name].settings()) for name in CLOSED},
        )
        saved = StateFile(state, identity)
    how: dict[str, Any] = {"search_windows": search_windows, "state": saved, "progress": progress}
    sets = LayerSets(short, calibration, evaluation, **how)
    rows = _rows(sets, cases, progress=progress)
    choices = {n: sets.choice(n) for n in (cases.counts if AUTO in cases.methods else ())}
    return ComparisonResult(rows, cases.counts, saved, choices=choices)


def _rows(sets: LayerSets, cases: Cases, *, progress: bool) -> list[Row]:
    """Every method x number of layers x healing, and the original model first.

    A set has no row for a way in which it cannot be healed.
    """
    every = [
        (method, seed, n)
        for method in cases.methods
        for seed in (range(SEEDS) if method == "random" else [None])
        for n in cases.counts
    ]
    most = max(cases.counts)
    chosen = [sets.layers(method, n, seed or 0, most=most) for method, seed, n in every]
    rows = [_row(sets, "dense", None, [], RAW)]
    total = len(every) * len(cases.healings)
    with bar("comparing", total=total, unit="model", show=progress) as shown:
        for healing in cases.healings:
            for (method, seed, _), layers in zip(every, chosen, strict=True):
                shown.update()
                if healing != "patch" or 0 not in layers:  # it needs a layer before it
                    rows.append(_row(sets, method, seed, layers, healing))
    return rows


def _row(sets: LayerSets, method: str, seed: int | None, layers: list[int], healing: str) -> Row:
    n, healed = len(layers), sets.perplexities(layers, healing)
    change = difference(sets.perplexities([]), healed)
    gain = None if healing == RAW else difference(sets.perplexities(layers), healed)
    parameters, size = size_without(sets.short, layers)
    quality = combined(healed)
    kld, same = quality.kld, quality.same_top
    return Row(
        method=method,
        seed=seed,
        n=n,
        healing=healing,
        layers=layers,
        perplexity=quality.value,
        nats=change.nats,
        standard_error=change.standard_error if n else 0.0,
        gain=None if gain is None else gain.nats,
        gain_error=None if gain is None else gain.standard_error,
        parameters=parameters,
        megabytes=size / 1e6,
        windows=change.windows,
        texts=change.texts,
        kld=None if kld is None else kld.value,
        kld_error=None if kld is None else kld.error.standard_error,
        same_top=None if same is None else same.value,
    )


@interruptible()
def compare_checkpoint(
    model: str, windows: WindowSettings, cases: Cases, opening: OpenOptions, running: Running
) -> ComparisonResult:
    """What `jobs.compare_checkpoint` does."""
    check_alone("compare")
    running.check()
    windows.check(shuffled=True)
    cases.check(HEALINGS)
    if (n_layers := check_model(model)) is not None:
        cases = cases.within(n_layers)
    windows.check_texts()
    size = windows.size or SIZE
    short = open_model(model, opening.as_begun(running.state), max_seq_len=size)
    cases = cases.within(len(short.kept))
    parts = windows.learning(short, size, None, validate=False, beside=running.state)
    result = compare(short, parts.training, parts.evaluation, **asdict(cases), state=running.state)
    return replace(result, bos=short.bos, precision=short.about_precision)

"""What each part of the refit brings on the real small model, and each window it is fitted on.

Every case removes 8 layers, heals the rest in closed form, and is judged on held-out chapters of
the book, on the half of a second text that nothing was fitted on, and on texts of other kinds:

- ``parts``: healed by the patch, by one half alone, by both, and by variants that the library does
  not have (`refit_trials`);
- ``windows``: by from 8 to 32 windows, of both texts, and by 16 of one.

    python benchmarks/studies/refits.py --also FILE --others FILE --out refits.json

``--also`` and ``--others`` are as in ``healing.py``. ``--only parts`` runs one group. Cases
are kept in a state beside the file, and the same command continues from it; ``--first N`` ends
after N new ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.baselines.refit_trials import VARIANTS
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.healing import (
    LAYERS,
    Windows,
    both_held_out,
    fitted_on,
    judge,
    judged_by,
    row,
)
from benchmarks.studies.scoring import SIZE, build
from short_gpt import ShortLlama
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import PatchSettings, refit
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile

Losses = dict[str, list[Perplexity]]


@dataclass(frozen=True)
class Case:
    """A set of layers and how what is left of it is healed.

    Attributes:
        layers: to remove.
        first, second: windows of the book and of the second text to fit on.
        size: their tokens.
        judged: windows of each kind to judge by.
        method: "patch", "refit", or a variant of it.
        options: of its `fit`.
    """

    layers: Sequence[int] = LAYERS
    first: int = 8
    second: int = 8
    size: int = 512
    judged: int = 6
    method: str = "refit"
    options: tuple[tuple[str, Any], ...] = ()


def cases() -> dict[str, dict[str, Case]]:
    """All cases by their group."""
    parts = {
        "patch": Case(method="patch"),
        "attention": Case(options=(("parts", ("attention",)),)),
        "mlp": Case(options=(("parts", ("mlp",)),)),
        "both": Case(),
        "both, equal weights": Case(options=(("weights", "equal"),)),
        "both, the whole step": Case(options=(("step_size", 1.0),)),
    }
    parts |= {f"both, {name}": Case(method=name) for name in VARIANTS}
    mixed = {f"{n} + {n}": Case(first=n, second=n) for n in (4, 8, 16)}
    alone = {"16 + 0": Case(first=16, second=0), "0 + 16": Case(first=0, second=16)}
    return {"parts": parts, "windows": {**mixed, **alone}}


def main(
    also: str,
    others: str | None = None,
    only: str | Sequence[str] = ("parts", "windows"),
    first: int | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the tables, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short = build()
    kinds = judged_by(short, also, others, 16)
    identity = {"model": short.identity(), "tokens": SIZE, "judged by": json_digest(kinds)}
    identity |= {
        "refit": vars(refit.RefitSettings()),
        "fitted on": json_digest(fitted(short, also)),
    }
    state = StateFile(f"{out or 'refits'}.state", identity, every=0.0)
    cells = Cells(state)
    groups = only.split(",") if isinstance(only, str) else only  # fire makes a,b a tuple
    plan = {group: each for group, each in cases().items() if group in groups}
    found: dict[str, dict[str, Any]] = {}
    new = 0
    for group, each in plan.items():
        found[group] = {}
        for name, case in each.items():
            if new == first:
                sys.exit()
            new += str(case) not in cells
            found[group][name] = rows = measured(cells, short, case, kinds, also)
            print(line(f"{group}: {name}", rows), flush=True)
    state.clear()
    content = {"tokens_of_parts": Case.size, "groups": found}
    finish("refits", [], content, out=out, overwrite=overwrite)


def fitted(short: ShortLlama, also: str, case: Case = Case()) -> Windows:
    """Windows that a case is fitted on."""
    return both_held_out(fitted_on(short, case.first, case.second, also, case.size))


def measured(
    cells: Cells, short: ShortLlama, case: Case, kinds: Mapping[str, Windows], also: str
) -> dict[str, Any]:
    """What a case restores on every kind of text."""
    gone = list(case.layers)

    def cut() -> Losses:
        with short.without_layers(gone):
            return judge(short, kinds)

    def healed() -> Losses:
        fit = {"patch": patched, "refit": refit.fit, **VARIANTS}[case.method]
        learned = fitted(short, also, case)
        result: Any = fit(short, gone, learned, **dict(case.options))
        with short.without_layers(gone):
            undo = refit.fold(short, result)
            found = judge(short, few)
            undo()
        return found

    few = {kind: read[: case.judged] for kind, read in kinds.items()}

    whole = by_kind(cells, "whole", kinds, lambda: judge(short, kinds))
    raw = by_kind(cells, f"cut {gone}", kinds, cut)
    parts = [by_kind(cells, str(case), few, healed), firsts(whole, case), firsts(raw, case)]
    names = ("healed", "whole", "cut")
    rows = {name: row(part, *parts[1:]) for name, part in zip(names, parts, strict=True)}
    return {"layers": gone, **rows}


def patched(
    short: ShortLlama, layers: Sequence[int], windows: Windows, **options: Any
) -> refit.Refit:
    return refit.fit(short, layers, windows, settings=PatchSettings(**options))


def firsts(losses: Losses, case: Case) -> Losses:
    """Those of the windows that the case is judged by."""
    return {kind: found[: case.judged] for kind, found in losses.items()}


def by_kind(
    cells: Cells, name: str, kinds: Mapping[str, Windows], measure: Callable[[], Losses]
) -> Losses:
    """Losses of every kind, kept in one cell."""
    every = cells.perplexities(
        name, lambda: [loss for found in measure().values() for loss in found]
    )
    taken = iter(every)
    return {kind: list(islice(taken, len(read))) for kind, read in kinds.items()}


def line(name: str, rows: Mapping[str, Any]) -> str:
    texts = [
        f"{kind} {rows['cut'][kind]['perplexity']:.2f} -> {found['perplexity']:.2f}"
        f" ({found['restored']:.0%})"
        for kind, found in rows["healed"].items()
    ]
    return f"{name:<28}" + "; ".join(texts)


if __name__ == "__main__":
    fire.Fire(main)

"""How near choices come to the best set that there is, of every 4 of 12 layers; real small model.

All 495 sets of 4 of the 12 layers of lowest Block Influence are judged on held-out chapters, as cut
and with the layers in front of gaps refitted (`gap_refit`, on calibration chapters). The
methods choose among the same 12 on calibration chapters, and each choice is told its rank among the
495 and how many nats it is from the best. The best of 495 is also the luckiest: so the same is told
against the set that is best on all windows but the one that is judged on. Some sets are refitted
whole as well, to see how far the cheap refit tells of the real one.

    python benchmarks/studies/optimality.py --out benchmarks/results/optimality.json

Continues from OUT.state; `--judged` may be lowered to end with the windows that are done.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch

from benchmarks.baselines.evolution import evolution
from benchmarks.baselines.gap_refit import GapRefits
from benchmarks.baselines.many_sets import ManySets, greedy_healed
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import build
from short_gpt import ShortLlama, windows
from short_gpt.data import demo
from short_gpt.data.windows import text_number
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import (
    Perplexity,
    Sample,
    combined,
    difference,
    window_perplexities,
)
from short_gpt.healing import refit
from short_gpt.models.decoder import pad
from short_gpt.models.numbering import runs
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.metrics import spearman
from short_gpt.selection.methods import choose

Layers = tuple[int, ...]
Windows = list[Any]
MOST = 8  # windows to judge on
KINDS = ("raw", "healed")


def main(
    n: int = 4,
    among: int = 12,
    judged: int = 4,
    size: int = 128,
    fitted: int = 48,
    searched: int = 4,
    checked: int = 3,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        n: layers that each set lacks.
        among: layers of lowest Block Influence that sets are made of.
        judged: windows of held-out chapters, at most 8.
        size: tokens in a window.
        fitted: windows of calibration chapters to score layers and to refit on.
        searched: further ones, for the searches by loss.
        checked: sets, evenly from the best refitted to the worst, to refit whole beside those that
            were chosen; 0 refits none.
    """
    begin(out, overwrite=overwrite)
    short = build()
    learned = cut(short, "calibration", size, fitted + searched)
    held = cut(short, "held_out", size, MOST)
    identity = {"model": short.identity(), "text": json_digest([learned, held])}
    identity |= {"refit": vars(refit.RefitSettings())}
    identity |= {"n": n, "among": among, "searched": searched}
    state = None if out is None else StateFile(f"{out}.state", identity)
    cells = Cells(state)
    fit_on, search_on = learned[searched:], learned[:searched]
    low, chosen = choices(short, fit_on, search_on, n, among, cells)
    sets = list(itertools.combinations(sorted(low), n))
    every = sorted({*sets, *(tuple(sorted(layers)) for layers in chosen.values())})
    found = judge(short, every, fit_on, held[:judged], cells)
    result = summary(found, sets, chosen)
    refits = partial(refitted, short, fit_on, held[:judged], cells)
    result["checked"] = check(found, sets, chosen, checked, refits)
    print(table(result))
    content = {"n": n, "among": sorted(low), "sets": len(sets), "windows": judged}
    content |= {"tokens_per_window": size, "windows_fitted": fitted, "windows_searched": searched}
    losses_of = {kind: [[*s, mean(parts)] for s, parts in found[kind].items()] for kind in KINDS}
    content |= {**result, "losses": losses_of}
    try:
        finish("optimality", [], content, held="judged", out=out, overwrite=overwrite)
    except SystemExit:
        if state is not None:
            state.clear()
        raise


def cut(short: ShortLlama, part: str, size: int, limit: int) -> Windows:
    texts = demo.bible(part)
    return list(windows(texts, short.encode, size=size, stride=size, seed=0, limit=limit))


def choices(
    short: ShortLlama, fit_on: Windows, search_on: Windows, n: int, among: int, cells: Cells
) -> tuple[list[int], dict[str, list[int]]]:
    """The layers that sets are made of, and what each method removes."""
    short.measure([*fit_on, *search_on], progress=False)
    low = short.layers_to_remove(n=among)
    decoder = short.decoder
    search: dict[str, Callable[[], list[int]]] = {
        "sleb": lambda: short.search(search_on, n, candidates=low).removed,
        "sleb_healed": lambda: greedy_healed(
            decoder, search_on, n, GapRefits(decoder, *refit.split_held_out(fit_on)), low
        ),
        "evolution": lambda: evolution(decoder, search_on, n, low).removed,
    }
    chosen = {name: choose(short.importance, n, method=name) for name in ("bi", "angular")}
    for name, run in search.items():
        chosen[name] = cells.value(name, run)
    return low, chosen


def judge(
    short: ShortLlama, sets: Sequence[Layers], fit_on: Windows, held: Windows, cells: Cells
) -> dict[str, dict[Layers, list[Perplexity]]]:
    """The losses of every window by kind and set."""
    mending = GapRefits(short.decoder, *refit.split_held_out(fit_on))
    gaps = {gap for layers in sets for gap in runs(layers, short.kept)}
    found: dict[str, dict[Layers, list[Perplexity]]] = {kind: {} for kind in KINDS}
    with bar("judging", total=len(held) * len(KINDS), unit="window", delay=0) as shown:
        for number, window in enumerate(held):
            for kind in KINDS:
                name = f"{kind} {number}"
                if kind == "healed" and name not in cells:
                    mending.prepare(gaps)
                many = ManySets(short.decoder, sets, mending if kind == "healed" else None)
                nats = cells.value(
                    name, lambda many=many, window=window: in_order(many, window, sets, short)
                )
                for layers, value in zip(sets, nats, strict=True):
                    part = Perplexity.of([Sample(text_number(window), value, len(window) - 1)])
                    found[kind].setdefault(layers, []).append(part)
                shown.update()
    return found


def in_order(
    many: ManySets, window: Sequence[int], sets: Sequence[Layers], short: ShortLlama
) -> list[float]:
    nats = many.nats(*pad([window], short.decoder))
    return [nats[layers] for layers in sets]


def summary(
    found: Mapping[str, Mapping[Layers, list[Perplexity]]],
    sets: Sequence[Layers],
    chosen: Mapping[str, list[int]],
) -> dict[str, Any]:
    """Rank and gap of every choice, as cut and refitted."""
    result: dict[str, Any] = {"best": {}, "choices": {}}
    for kind in KINDS:
        best = min(sets, key=lambda s: mean(found[kind][s]))
        result["best"][kind] = {"layers": best, "loss": mean(found[kind][best])}
    for name, layers in chosen.items():
        key = tuple(sorted(layers))
        rows = {kind: row(found[kind], sets, key) for kind in KINDS}
        result["choices"][name] = {"layers": layers, **rows}
    both = [torch.tensor([mean(found[kind][s]) for s in sets]).double() for kind in KINDS]
    result["rank_correlation_of_raw_with_healed"] = spearman(*both)
    return result


def row(
    found: Mapping[Layers, list[Perplexity]], sets: Sequence[Layers], key: Layers
) -> dict[str, float]:
    """Where a set stands among all, and how far from the best."""
    loss = mean(found[key])
    best = min(sets, key=lambda s: mean(found[s]))
    gap = difference(found[best], found[key])
    rank = 1 + sum(mean(found[s]) < loss for s in sets)
    error = 0.0 if best == key else gap.standard_error
    apart = difference(best_elsewhere(found, sets), found[key])
    return {
        "loss": loss,
        "rank": rank,
        "gap": gap.nats,
        "standard_error": error,
        "gap_to_best_on_other_windows": apart.nats,
        "standard_error_of_that": apart.standard_error,
    }


def best_elsewhere(
    found: Mapping[Layers, list[Perplexity]], sets: Sequence[Layers]
) -> list[Perplexity]:
    """For every window, what the set loses on it that is best on all the others."""
    count = len(found[sets[0]])
    result = []
    for place in range(count):
        rest = [i for i in range(count) if i != place]
        best = min(sets, key=lambda s: sum(found[s][i].nats for i in rest))
        result.append(found[best][place])
    return result


def check(
    found: Mapping[str, Mapping[Layers, list[Perplexity]]],
    sets: Sequence[Layers],
    chosen: Mapping[str, list[int]],
    count: int,
    refits: Callable[[Layers], list[Perplexity]],
) -> dict[str, Any]:
    """Sets that are refitted whole: their losses as cut, refitted in front, and whole."""
    if not count:
        return {}
    ranked = sorted(sets, key=lambda s: mean(found["healed"][s]))
    places = [round(i * (len(ranked) - 1) / max(count - 1, 1)) for i in range(count)]
    ours = {name: tuple(sorted(layers)) for name, layers in chosen.items()}
    whole = {s: refits(s) for s in dict.fromkeys([*ours.values(), *(ranked[i] for i in places)])}
    rows = [[*(mean(found[kind][s]) for kind in KINDS), mean(parts)] for s, parts in whole.items()]
    columns = torch.tensor(rows).double().T
    agree = {kind: spearman(columns[i], columns[2]) for i, kind in enumerate(KINDS)}
    against = {}
    for name, layers in ours.items():
        change = difference(whole[ours["sleb"]], whole[layers])
        against[name] = {"loss": mean(whole[layers]), "less_sleb": change.nats}
        against[name]["standard_error"] = 0.0 if layers == ours["sleb"] else change.standard_error
    sets_of = [list(s) for s in whole]
    return {
        "sets": sets_of,
        "raw, healed, refit": rows,
        "rank_correlation": agree,
        "choices": against,
    }


def refitted(
    short: ShortLlama, fit_on: Windows, held: Windows, cells: Cells, layers: Layers
) -> list[Perplexity]:
    """The losses of every window without layers, refitted whole."""

    def run() -> list[Perplexity]:
        made = refit.fit(short, list(layers), fit_on)
        with short.without_layers(layers):
            undo = refit.fold(short, made)
            try:
                return window_perplexities(short.decoder, held, progress=False)
            finally:
                undo()

    return cells.perplexities(f"refit {list(layers)} {len(held)}", run)


def mean(parts: Sequence[Perplexity]) -> float:
    """Nats a token."""
    whole = combined(parts)
    return whole.nats / whole.tokens


def table(result: Mapping[str, Any]) -> str:
    lines = []
    for kind in KINDS:
        best = result["best"][kind]
        lines.append(f"{kind}: the best set {list(best['layers'])}, loss {best['loss']:.4f}")
        lines.append(f"  {'':<12}{'layers':<20}{'rank':>5}  {'gap':>15}  to the best elsewhere")
        for name, found in result["choices"].items():
            cell = found[kind]
            gap = f"{cell['gap']:.3f} ({cell['standard_error']:.3f})"
            apart = f"{cell['gap_to_best_on_other_windows']:+.3f}"
            apart += f" ({cell['standard_error_of_that']:.3f})"
            layers = str(sorted(found["layers"]))
            lines.append(f"  {name:<12}{layers:<20}{cell['rank']:>5}  {gap:>15}  {apart}")
    lines.append(f"raw with healed: {result['rank_correlation_of_raw_with_healed']:.3f}")
    if not result["checked"]:
        return "\n".join(lines)
    lines.append("refitted whole:")
    for name, found in result["checked"]["choices"].items():
        less = f"{found['less_sleb']:+.3f} ({found['standard_error']:.3f})"
        lines.append(f"  {name:<12}{found['loss']:>8.4f}  less sleb {less}")
    rows = zip(result["checked"]["sets"], result["checked"]["raw, healed, refit"], strict=True)
    lines += [f"  {layers!s:<20}" + "".join(f"{x:>9.4f}" for x in cells) for layers, cells in rows]
    agree = result["checked"]["rank_correlation"]
    return "\n".join([*lines, f"rank correlation with the whole refit: {agree}"])


if __name__ == "__main__":
    fire.Fire(main)

"""The refit on the real small model: what it costs in passes, and what it restores on which text.

Layers are removed and what is left is refitted on windows of the book, or of the book and another
text, and judged on held-out chapters and on texts that nothing was fitted on. The bare pass over
the same windows is timed before and after every refit.

    python benchmarks/studies/healing.py --also FILE --others FILE,FILE --out healing.json

``--also`` is a text file whose first half is fitted on beside the book, and whose second half is
judged on; ``--others`` are text files that are judged on alone. ``--own N`` adds N windows that the
model writes, which are kept in ``--texts`` and not timed. ``--methods`` are of patch, refit
and refit:AIM, the share of what is missing that its changes are to give.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.judging import Windows, both_held_out, cut, halves, judge, judged_by, row
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import SIZE, bare, build
from short_gpt import ShortLlama, own_samples
from short_gpt.data import demo
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import PatchSettings, RefitSettings, refit

LAYERS = (2, 3, 12, 13, 14, 15, 17, 25)  # the lowest 8 by Block Influence on the book
PASSES = 4.0  # that a refit may take, the solving included


def main(
    layers: Sequence[int] = LAYERS,
    count: int = 48,
    also: str | None = None,
    others: str | None = None,
    judged: int = 16,
    methods: str | Sequence[str] = "patch,refit",
    own: int = 0,
    texts: str = ".",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short = build()
    learned = fitted_on(short, count, count, also)
    if own:
        learned += own_samples(short, own, SIZE, chat=False, beside=Path(texts) / "texts")
        random.Random(0).shuffle(learned)  # every eighth is held out of the fit: of all texts
    else:
        learned = both_held_out(learned)
    kinds = judged_by(short, also, others, judged)
    found: dict[str, dict[str, list[Perplexity]]] = {"whole": judge(short, kinds)}
    with short.without_layers(layers):
        found["cut"] = judge(short, kinds)
    costs: dict[str, dict[str, float]] = {}
    for method in methods.split(",") if isinstance(methods, str) else methods:
        before = bare_pass(short, learned)
        started = time.perf_counter()
        name, _, aim = method.partition(":")
        settings = {"patch": PatchSettings(), "refit": RefitSettings()}[name]
        changes = {"step_size": float(aim)} if aim else {}
        fitted = refit.fit(short, list(layers), learned, settings=settings, **changes)
        seconds = time.perf_counter() - started
        passes = (before, bare_pass(short, learned))
        costs[method] = {"seconds": seconds, "passes": seconds / (sum(passes) / 2)}
        costs[method] |= {"passes_least": seconds / max(passes)}
        costs[method] |= {"passes_most": seconds / min(passes)}
        with short.without_layers(layers):
            undo = refit.apply_refit(short, fitted)
            found[method] = judge(short, kinds)
            undo()
    rows = {name: row(parts, found["whole"], found["cut"]) for name, parts in found.items()}
    print(table(rows, costs))
    missed = [
        f"{name} takes {cost['passes']:.2f} bare passes, at most {PASSES}"
        for name, cost in costs.items()
        if cost["passes"] > PASSES
    ]
    content = {"layers": list(layers), "windows": len(learned), "tokens_per_window": SIZE}
    content |= {"own": own} if own else {}
    finish(
        "healing", missed, {**content, "rows": rows, "cost": costs}, out=out, overwrite=overwrite
    )


def fitted_on(short: ShortLlama, first: int, second: int, also: str | None) -> Windows:
    """So many windows of the book and of the second text, in turn."""
    book = cut(short, demo.bible("calibration"), first)
    other = cut(short, [halves(also)[0]], second) if also else []
    pairs = [w for pair in zip(book, other, strict=False) for w in pair]
    return pairs + book[len(other) :] + other[len(book) :]


def bare_pass(short: ShortLlama, learned: Windows) -> float:
    """Seconds of one pass through the layers over all windows."""
    started = time.perf_counter()
    for window in learned:
        bare(short, window)
    return time.perf_counter() - started


def table(
    rows: Mapping[str, Mapping[str, Mapping[str, float]]], costs: Mapping[str, Mapping[str, float]]
) -> str:
    """A line for every model and kind of text, and one for every cost."""
    lines = [f"{'':<8}{'text':<32}{'perplexity':>11}{'restored':>10}"]
    for name, kinds in rows.items():
        for kind, found in kinds.items():
            line = f"{name:<8}{kind:<32}{found['perplexity']:>11.3f}{found['restored']:>10.1%}"
            lines.append(line)
    for name, cost in costs.items():
        lines.append(f"{name}: {cost['seconds']:.0f} s")
        if "passes" in cost:
            low, high = cost["passes_least"], cost["passes_most"]
            lines[-1] += f", {cost['passes']:.2f} bare passes ({low:.2f} to {high:.2f})"
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)

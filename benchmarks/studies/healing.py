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

from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import SIZE, bare, build
from short_gpt import ShortLlama, own_samples, windows
from short_gpt.data import demo, without_overlap
from short_gpt.evaluation.perplexity import Perplexity, combined, difference, window_perplexities
from short_gpt.healing import PatchSettings, RefitSettings, refit

LAYERS = (2, 3, 12, 13, 14, 15, 17, 25)  # the lowest 8 by Block Influence on the book
FIRST_HALF = "first half of the second text"
MOST_JUDGED = 24  # windows of a kind by which a script judges, at most
PASSES = 4.0  # that a refit may take, the solving included
Windows = list[list[int]]


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
        learned += own_samples(short, own, SIZE, beside=Path(texts) / "texts")
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
            undo = refit.fold(short, fitted)
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


def fitted_on(
    short: ShortLlama, first: int, second: int, also: str | None, size: int = SIZE
) -> Windows:
    """So many windows of the book and of the second text, in turn."""
    book = cut(short, demo.bible("calibration"), first, size)
    other = cut(short, [halves(also)[0]], second, size) if also else []
    pairs = [w for pair in zip(book, other, strict=False) for w in pair]
    return pairs + book[len(other) :] + other[len(book) :]


def both_held_out(windows: Windows) -> Windows:
    """Windows of two texts in turn, with the pairs of every second eight the other way round.

    A refit holds every eighth window out, which would always be of the second text.
    """
    pairs = zip(windows[1::2], windows[::2], strict=False)
    turned = [w for pair in pairs for w in pair] + windows[len(windows) // 2 * 2 :]
    return [(turned if i // 8 % 2 else windows)[i] for i in range(len(windows))]


def judged_by(
    short: ShortLlama, also: str | None, others: str | None, judged: int, size: int = SIZE
) -> dict[str, Windows]:
    """Windows to judge by, by their kind."""
    kinds = {"held-out chapters": cut(short, demo.bible("held_out"), judged, size)}
    if also is not None:
        kinds["other half of the second text"] = cut(short, [halves(also)[1]], judged, size)
    for path in filter(None, (others or "").split(",")):
        kinds[Path(path).stem] = cut(short, [Path(path).read_text("utf-8")], judged, size)
    return kinds


def chosen_by(
    short: ShortLlama, also: str, others: str, learned: Windows, judged: int, size: int = SIZE
) -> dict[str, Windows]:
    """Windows to choose settings by, by their kind: nothing is fitted on them.

    They are of the texts that are learned from, and of the last tenth of the novels without what
    `judged_by` takes of it: what is chosen is not judged by the same text.
    """
    novels = Path(others).read_text("utf-8")
    tail = novels[novels.rfind("\n", 0, len(novels) * 9 // 10) :]
    texts = {"chapters": demo.bible("calibration"), FIRST_HALF: [halves(also)[0]]}
    taken = [*learned]
    for each in (size, SIZE):
        taken += judged_by(short, None, others, MOST_JUDGED, each)[Path(others).stem]
    found = {}
    for kind, read in {**texts, "novels": [tail]}.items():
        own = cut(short, read, len(learned) + 4 * judged, size)
        found[kind] = without_overlap(own, taken)[0][:judged]
    return found


def cut(short: ShortLlama, texts: Sequence[str], limit: int, size: int = SIZE) -> Windows:
    if limit == 0:
        return []
    return list(windows(texts, short.encode, size=size, stride=size, seed=0, limit=limit))


def halves(path: str) -> tuple[str, str]:
    """A text file's two halves, parted at the end of a line."""
    text = Path(path).read_text(encoding="utf-8")
    half = text.rfind("\n", 0, len(text) // 2)
    return text[:half], text[half:]


def bare_pass(short: ShortLlama, learned: Windows) -> float:
    """Seconds of one pass through the layers over all windows."""
    started = time.perf_counter()
    for window in learned:
        bare(short, window)
    return time.perf_counter() - started


def judge(short: ShortLlama, kinds: Mapping[str, Windows]) -> dict[str, list[Perplexity]]:
    return {kind: window_perplexities(short.decoder, read) for kind, read in kinds.items()}


def row(
    parts: Mapping[str, list[Perplexity]],
    whole: Mapping[str, list[Perplexity]],
    cut: Mapping[str, list[Perplexity]],
) -> dict[str, dict[str, float]]:
    """Perplexity by kind, the nats that it is from the whole model, and the share brought back."""
    result = {}
    for kind, found in parts.items():
        lost, left = (difference(whole[kind], other[kind]) for other in (cut, parts))
        result[kind] = {
            "perplexity": combined(found).value,
            "nats": left.nats,
            "standard_error": left.standard_error,
            "restored": 1 - left.nats / lost.nats,
        }
    return result


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

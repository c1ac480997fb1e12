"""How much a choice of layers depends on the sample of calibration text; the real small model.

The rankings that cost one pass choose 4 and 8 layers on several samples of calibration chapters,
which share no window, and on samples of other texts. The first sample is the windows of `compare`'s
table. Block Influence also chooses on every 4 windows of a sample. Every distinct set is then
judged, as pruned, on the first of the held-out windows of that table.

    python benchmarks/studies/choice_variance.py --also FILE --others FILE --out FILE

Texts are as in ``healing.py``. Continues from OUT.state.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.baselines.many_sets import ManySets
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.healing import cut, halves
from benchmarks.studies.scoring import SIZE, build
from short_gpt import Importance, ShortLlama
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
from short_gpt.models.decoder import pad
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.run import measure
from short_gpt.selection.methods import choose

METHODS = ("bi", "relative_magnitude", "angular")
COUNTS = (4, 8)  # layers to remove
FEW = 4  # windows of a short sample
Layers = tuple[int, ...]
Windows = list[list[int]]


def main(
    draws: int = 5,
    count: int = 24,
    judged: int = 8,
    also: str | None = None,
    others: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        draws: samples of calibration chapters.
        count: windows of 1024 tokens in each, and in the sample of every other text.
        judged: windows of held-out chapters.
        also, others: as in ``healing.py``; of the first file the first half is read.
        out, overwrite: the JSON file.
    """
    begin(out, overwrite=overwrite)
    short = build()
    chapters = cut(short, demo.bible("calibration"), draws * count)
    samples = [("chapters", chapters[i : i + count]) for i in range(0, draws * count, count)]
    texts = [(Path(also).stem, halves(also)[0])] if also else []
    for path in filter(None, (others or "").split(",")):
        texts.append((Path(path).stem, Path(path).read_text(encoding="utf-8")))
    samples += [(name, cut(short, [text], count)) for name, text in texts]
    held_out = cut(short, demo.bible("held_out"), judged)
    text = json_digest([held_out, *(windows for _, windows in samples)])
    identity = {"model": short.identity(), "text": text, "count": count}
    state = None if out is None else StateFile(f"{out}.state", identity)
    cells = Cells(state)
    choices = chosen(short, samples, cells)
    sets = sorted({tuple(c["layers"]) for c in choices}, key=lambda s: (len(s), s))
    result = judge(short, sets, held_out, cells)
    print(table(choices, result["sets"]))
    content = {"draws": draws, "windows_to_rank_on": count, "windows_of_a_short_sample": FEW}
    content |= {"windows_to_judge_by": judged, "tokens_per_window": SIZE}
    content |= {"choices": choices, **result}
    try:
        finish("choice_variance", [], content, held="judged", out=out, overwrite=overwrite)
    except SystemExit:
        if state is not None:
            state.clear()
        raise


def chosen(
    short: ShortLlama, samples: Sequence[tuple[str, Windows]], cells: Cells
) -> list[dict[str, Any]]:
    """Every choice: the text, the windows read of it, the method and the layers, ascending."""
    choices = []
    with bar("ranking", total=len(samples), unit="sample", delay=0) as shown:
        for number, (text, windows) in enumerate(samples):
            name = f"{text} {number}"
            rows = cells.value(name, lambda windows=windows: rankings(short, windows))
            choices += [{"text": text, **row} for row in rows]
            shown.update()
    return choices


def rankings(short: ShortLlama, windows: Windows) -> list[dict[str, Any]]:
    """What every method removes by all windows, and Block Influence by every few of them."""
    parts = [
        measure(short.decoder, ([window] for window in windows[i : i + FEW]))
        for i in range(0, len(windows), FEW)
    ]
    rows = [row(part, "bi") for part in parts]
    scores = sum(parts[1:], parts[0])
    return [r for group in (*rows, *(row(scores, m) for m in METHODS)) for r in group]


def row(scores: Importance, method: str) -> list[dict[str, Any]]:
    """A method's choice for every number of layers."""
    return [
        {
            "windows": scores.n_windows,
            "method": method,
            "layers": sorted(choose(scores, n, method=method)),
        }
        for n in COUNTS
    ]


def judge(
    short: ShortLlama, sets: Sequence[Layers], held_out: Windows, cells: Cells
) -> dict[str, Any]:
    """The perplexity of the original model and of every set, with the error of its change."""
    many = ManySets(short.decoder, sets)

    def nats(window: list[int]) -> list[list[Any]]:
        return [[*item] for item in many.nats(*pad([window], short.decoder)).items()]

    dense: list[Perplexity] = []
    pruned: dict[Layers, list[Perplexity]] = {layers: [] for layers in sets}
    with bar("judging", total=len(held_out), unit="window", delay=0) as shown:
        for number, window in enumerate(held_out):
            dense += cells.perplexities(
                f"dense {number}",
                lambda window=window: window_perplexities(short.decoder, [window], progress=False),
            )
            for layers, value in cells.value(f"{number}", lambda window=window: nats(window)):
                part = Perplexity.of([Sample(text_number(window), value, len(window) - 1)])
                pruned[tuple(layers)].append(part)
            shown.update()
    rows = []
    for layers, parts in pruned.items():
        change = difference(dense, parts)
        rows.append({"layers": list(layers), "perplexity": combined(parts).value})
        rows[-1] |= {"nats": change.nats, "standard_error": change.standard_error}
    return {"dense": combined(dense).value, "sets": rows}


def table(choices: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]]) -> str:
    """A line for every set: its perplexity, and how many samples chose it by which method."""
    lines = []
    for found in sets:
        names = [
            f"{c['method']} on {c['windows']} of {c['text']}"
            for c in choices
            if c["layers"] == found["layers"]
        ]
        counts = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        error = found["perplexity"] * found["standard_error"]
        layers = ", ".join(map(str, found["layers"]))
        lines.append(f"{layers:<32}{found['perplexity']:>9.2f} ({error:.2f})  {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)

"""Layers removed and fewer bits together: the distance that each pair costs, and what it saves.

A greedy search by KL divergence on the model's own text gives nested sets of layers. Without each
set the model is refitted on that text, and written with its layers in the types that they have and
in every type of `costs.rivals`. Every file is opened again and compared with the original, in
float32, on WikiText-2 and on the original's own answers.

    python benchmarks/studies/front.py --wikitext wikitext2_test.txt --files front-smollm2 \
        --out front_smollm2.json

The same command goes on after an interruption. With ``--speeds`` it also times the files in
llama.cpp: those of one type in turns with the original, when nothing else runs. With
``--plot FOLDER`` it only draws the pictures of the result ``--out``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire

from benchmarks.lib.judging import cut
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.tables.rows import front
from llama.formats.gguf_write import F16, stored
from short_gpt import heal_refit, own_samples
from short_gpt.checkpoints.gguf import TYPES, Stack, is_quantized, write_gguf
from short_gpt.costs import requantized
from short_gpt.costs.rivals import of_file
from short_gpt.costs.speeds import of_files
from short_gpt.data.windows import Window
from short_gpt.evaluation.answers import answer_windows, ask, questions
from short_gpt.evaluation.distance import Reference
from short_gpt.healing.choosing import ResultCache
from short_gpt.models.decoder import in_own_dtype
from short_gpt.plots import empty, logarithmic, save
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import FASTER, OpenOptions
from short_gpt.wrappers.short_model import ShortModel

COUNTS = (0, 1, 2, 3, 4, 6, 8)  # layers removed
OWN, SIZE, SEARCHED = 24, 256, 4  # own windows that the refit reads, their tokens; and the search
JUDGED, ASKED, WRITTEN = 8, 20, 24  # windows; questions, and most tokens of an answer
SOURCE = "source"  # every tensor in the type that it has in the original
MARKERS = dict(zip((SOURCE, *TYPES), "*osD^vP", strict=True))
SECONDS = 40.0  # of timing the files of one type
READING = OpenOptions(device="cpu", dtype="float32", precision=FASTER)  # as `shrink` reads
JUDGING = OpenOptions(device="cpu", dtype="float32")


def main(
    model: str = "smollm2",
    wikitext: str = "wikitext2_test.txt",
    files: str = "front",
    counts: Sequence[int] = COUNTS,
    types: Sequence[str] = tuple(TYPES),
    speeds: bool = False,
    plot: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        model: a name of `real_models.MODELS`.
        files: folder of the models' files, and of the state from which a later run goes on.
        counts, types: layers removed; names of `checkpoints.gguf.TYPES`.
    """
    if plot is not None:
        return draw(Path(str(out)), Path(plot))
    begin(out, overwrite=overwrite)
    folder, source = Path(files), MODELS[model]()
    folder.mkdir(parents=True, exist_ok=True)
    short = open_trainable(str(source), READING.as_begun(folder / "state.json"))
    own = own_samples(short, OWN, SIZE, beside=folder / "own")
    texts = {"wikitext": cut(short, [Path(wikitext).read_text("utf-8")], JUDGED, SIZE)}
    reference = Reference(short.decoder)
    with in_own_dtype(short.decoder):
        replies = ask(short, questions()[: 2 * ASKED : 2], max_new_tokens=WRITTEN)
        texts["answers"] = [*answer_windows(replies)]
        reference.read(chain(*texts.values()))
    read = {kind: windows_digest(windows) for kind, windows in texts.items()}
    cells = ResultCache(StateFile(folder / "state.json", short.identity() | read, folder=folder))
    order = cells.resumed("order", lambda part: searched(short, own[:SEARCHED], part))
    layers = len(short.kept)
    reference.keep_head()
    rows, paths = [], dict[tuple[str, int], Path]()
    for n in counts:
        made = written(source, folder, sorted(order[:n]), own, types)
        for kind, path in made.items():
            row = cells.value(f"{n} {kind}", lambda path=path: judged(path, texts, reference))
            rows.append({"removed": n, "type": kind, **row})
            paths[kind, n] = path
            print(f"{n} removed, {kind}: {row}", flush=True)
    window = texts["wikitext"][0]
    for kind in (SOURCE, *types) if speeds else ():
        timed = {"original": source} | {str(n): paths[kind, n] for n in counts}
        cells.value(f"speeds {kind} {counts}", lambda timed=timed: in_turns(timed, window))
    for row in rows:
        name = f"speeds {row['type']} {counts}"
        row["speeds"] = cells.value(name, dict)[str(row["removed"])] if name in cells else None
    content = {"model": model, "layers": layers, "order": order, "bytes": source.stat().st_size}
    content |= {"own_windows": [OWN, SIZE], "judged": [JUDGED, SIZE], "questions": len(replies)}
    finish("front", [], content | {"rows": rows}, out=out, overwrite=overwrite)


def searched(short: ShortModel, windows: Sequence[Window], state: StateFile | None) -> list[int]:
    """The layers to remove, in the order in which they go."""
    return short.search(windows, max(COUNTS), method="greedy_kld", state=state).removed


def written(
    source: Path, folder: Path, layers: Sequence[int], own: Sequence[Window], types: Sequence[str]
) -> dict[str, Path]:
    """The refitted model's file in each type, rounded once: of float16, or as it is saved."""
    n = len(layers)
    paths = {kind: folder / f"{n}-{kind}.gguf" for kind in (SOURCE, *types)}
    missing = [kind for kind, path in paths.items() if not path.is_file()]
    whole, fitted = folder / "whole.gguf", folder / f"{n}-f16.gguf"
    if not whole.is_file():
        in_float16(source, whole)
    if not n:
        paths[SOURCE], fitted = source, whole
    elif missing and not (fitted.is_file() and paths[SOURCE].is_file()):
        short = open_trainable(str(source), READING.as_begun(folder / "state.json"))
        heal_refit(short, layers, own)
        short.save(paths[SOURCE], overwrite=True)
        short.source = str(whole)  # the types of its tensors
        short.save(fitted, overwrite=True)
    for kind in missing:
        if kind != SOURCE:
            requantized(fitted, paths[kind], kind)
    (folder / f"{n}-f16.gguf").unlink(missing_ok=True)
    return paths


def in_float16(source: Path, out: Path) -> None:
    """A GGUF model with its layers' matrices in float16, which every other type is made of."""
    stack = Stack(source)
    changed = {
        name: stored(name, stack.read(name), F16)
        for name, entry in stack.tensors.items()
        if is_quantized(name, entry.shape)
    }
    write_gguf(stack, out, range(stack.blocks), changed=changed)


def judged(path: Path, texts: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    """The size of a file and, by kind of text, its distance from the original."""
    found = of_file(path, texts, reference, JUDGING)
    row: dict[str, Any] = {"bytes": found.size, "types": found.name}
    for kind, quality in found.quality.items():
        kld, top = quality.kld, quality.same_top
        assert kld is not None and top is not None  # as there is a reference
        row[kind] = {"kld": kld.value, "interval_95": kld.interval(), "same_top": top.value}
    return row


def in_turns(paths: Mapping[str, Path], window: Sequence[int]) -> dict[str, Any]:
    """Speeds of files, the original's first."""
    found = of_files(paths, window, most={}, seconds=SECONDS)
    return {name: {w: s._asdict() for w, s in works.items()} for name, works in found.items()}


def draw(result: Path, folder: Path) -> None:
    """Draws KL divergence against every dial in one picture, on a light and on a dark page."""
    from matplotlib import style

    content = json.loads(result.read_text(encoding="utf-8"))
    rows, dials = content["rows"], {"file, MB": [row["bytes"] / 1e6 for row in content["rows"]]}
    if all(row["speeds"] for row in rows):
        for work, title in (("prompt", "read a prompt"), ("generation", "write a token")):
            times = [1 / row["speeds"][work]["ratio"] for row in rows]
            dials[f"time to {title}, the original's = 1"] = times
    for page, ending in (("default", ""), ("dark_background", "_dark")):
        with style.context(page):
            figure = empty(1.8 + 3.7 * len(dials), 4.4)
            for column, (title, places) in enumerate(dials.items()):
                axes = figure.add_subplot(1, len(dials), column + 1)
                panel(axes, rows, places, 1.0 if column else content["bytes"] / 1e6)
                axes.set_xlabel(title)
            figure.axes[0].set_ylabel("mean KLD on WikiText-2, nats a token")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", frameon=False)
            save(figure, folder / f"{result.stem}{ending}.png")


def panel(axes: Any, rows: Sequence[Any], places: Sequence[float], original: float) -> None:
    """A point for each file: layers removed by colour, types by marker, and the front ringed."""
    from matplotlib import colormaps, rcParams

    points = [(x, row["wikitext"]["kld"]) for x, row in zip(places, rows, strict=True)]
    shown = [i for i, row in enumerate(rows) if row["removed"] or row["type"] != SOURCE]
    ink, counts = rcParams["text.color"], sorted({row["removed"] for row in rows})
    for n in counts:
        colour = colormaps["viridis"](0.2 + 0.65 * n / max(1, counts[-1]))
        own = [i for i in shown if rows[i]["removed"] == n]
        label = f"{n or 'no'} layer{'s' * (n != 1)} removed"
        joined = [points[i] for i in own if rows[i]["type"] != SOURCE]
        axes.plot(*zip(*joined, strict=True), color=colour, label=label)
        for i in own:
            marker = MARKERS[rows[i]["type"]]
            axes.plot(*points[i], marker=marker, color=colour, markersize=6, zorder=3)
        at = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(str(n), max(points[i] for i in own), (7, 0), **at)
    for kind, marker in MARKERS.items():
        label = "types of the original" if kind == SOURCE else kind.upper()
        axes.plot([], [], marker=marker, color="grey", linestyle="", label=label)
    best = zip(*{*front(points)} & {points[i] for i in shown}, strict=True)
    ring = {"marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "", "color": ink}
    axes.plot(*best, **ring, label="front: no other file is\nas near and as small or fast")
    axes.axvline(original, color="grey", linestyle=":", label="the original's file")
    logarithmic(axes, "g")
    axes.margins(x=0.09)  # room for the numbers at the right
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    fire.Fire(main)

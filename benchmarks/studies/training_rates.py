"""The learning rate of a short distillation: which one suits a model of which width.

A quarter of the layers, those of least Block Influence, is removed, the rest is refitted, and then
distilled as `shrink --minutes` does it, at several rates, each time from the same refit, over the
same steps and windows. Other windows of the same texts tell the divergence from the original model;
no window that judges a model elsewhere is read here.

    python benchmarks/studies/training_rates.py --wikitext wikitext2_test.txt --out FILE

Texts and models are those of `larger.py`; ``--wikitext`` is calibration text here, its first half.
Rates that are done are kept beside the file, and the same command continues.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.distilled import VALIDATED
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.studies.distillation import divided
from benchmarks.studies.larger import Reading, named, write_texts
from short_gpt import choose, windows
from short_gpt.data import without_overlap
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import Perplexity, difference, window_perplexities
from short_gpt.healing import (
    CachedTeacher,
    Distillation,
    Learning,
    Recipe,
    RefitSettings,
    heal_refit,
    recipe_for,
)
from short_gpt.healing.lora import heal_run
from short_gpt.healing.trainer import TrainingRun
from short_gpt.jobs import inputs
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.short_hf import ShortHFModel

KINDS = ("prose", "code", "chat", "wikitext")
FITTED = 20  # windows of each kind that the refit reads, the first 12 of which choose the layers
CHOOSE = 12
Windows = list[list[int]]


def main(
    wikitext: str,
    model: str = "0.5b",
    rates: Sequence[float] = (1e-3, 5e-4, 2.5e-4, 1.25e-4),
    steps: int = 40,
    size: int = 128,
    work: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        wikitext: file of WikiText-2's text.
        model: 1.5b, 0.5b or smollm2.
        rates: at the peak.
        steps: of training, each of two windows.
        size: tokens of a window.
        work: folder of the texts; larger-MODEL if not given, as that of `larger.py`.
    """
    begin(out, overwrite=overwrite)
    source, folder = MODELS[model](), Path(work or f"larger-{model}")
    reading = Reading(KINDS, size, 0, 0, None, "mixed")
    write_texts(folder / "texts", source, reading, wikitext, None)
    short = open_trainable(str(source))
    short.decoder.mixed = True
    pools = [_cut(short, folder, kind, size, FITTED + steps) for kind in KINDS]
    fitted, learning = divided(pools, [FITTED] * len(KINDS), 2 * steps, [])
    read = json_digest([fitted, learning.training, learning.validation])
    identity = {**short.identity(), "read": read, "refit": vars(RefitSettings())}
    cells = Cells(StateFile(f"{out or 'training_rates.json'}.state", identity, every=0.0))
    width = short.model.config.hidden_size
    layers = choose(short.measure([w for pool in pools for w in pool[:CHOOSE]]), _quarter(short))
    names = {rate: f"rate {rate:g}, {steps} steps" for rate in rates}
    if any(name not in cells for name in names.values()):
        _measure(short, layers, fitted, learning, names, cells)
    rows = {f"{rate:g}": _row(cells, name) for rate, name in names.items()}
    for rate, row in rows.items():
        print(f"{rate:>8} {row['divergence']} {row['nats']:+.4f} ({row['standard_error']:.4f})")
    content = {"model": source.name, "width": width, "layers": sorted(layers), "steps": steps}
    content |= {"windows": [len(fitted), len(learning.training), VALIDATED], "size": size}
    recipe = asdict(_recipe(short, steps, size, rates[0]))
    del recipe["learning_rate"]
    finish("training_rates", [], {**content, "rows": rows, "recipe": recipe}, out=out,
           overwrite=overwrite)  # fmt: skip


def _recipe(short: ShortHFModel, steps: int, size: int, rate: float) -> Recipe:
    changes = {"steps": steps, "size": size, "eval_every": max(1, steps // 5)}
    return recipe_for(short.model.config, "small", learning_rate=rate, **changes)


def _cut(short: ShortHFModel, folder: Path, kind: str, size: int, limit: int) -> Windows:
    (texts,) = inputs.Windows(named(folder / "texts/calibration", [kind])).kinds()
    own = [*windows(texts, short.encode, size=size, stride=size, seed=0, limit=limit)]
    return without_overlap(own, [])[0]


def _quarter(short: ShortHFModel) -> int:
    return round(len(short.kept) / 4)


def _measure(
    short: ShortHFModel,
    layers: Sequence[int],
    fitted: Windows,
    learning: Learning,
    names: Mapping[float, str],
    cells: Cells,
) -> None:
    """Every rate that is missing, from one refit; each change is taken out again."""
    read, steps = [*learning.training, *learning.validation], len(learning.training) // 2
    with tempfile.TemporaryDirectory() as kept:
        teacher = CachedTeacher(Path(kept), short, read)
        teacher.fill()
        heal_refit(short, layers, fitted)
        cells.perplexities("refit", lambda: window_perplexities(short.decoder, learning.validation))
        for rate, name in names.items():
            if name in cells:
                continue
            recipe = _recipe(short, steps, len(read[0]), rate)
            run = TrainingRun(learning.training, learning.validation, recipe)
            healed, undo = heal_run(short, run._replace(distillation=Distillation(teacher)))
            cells.perplexities(
                f"{name}: losses", lambda: window_perplexities(short.decoder, learning.validation)
            )
            undo()
            assert healed.divergence is not None
            found = {f"{step}": value for step, value in healed.divergence.items()}
            cells.value(name, partial(dict, found))


def _row(cells: Cells, name: str) -> dict[str, Any]:
    """The divergence by step, and the loss of the kept step beside that of the refit."""
    before, after = (_losses(cells, cell) for cell in ("refit", f"{name}: losses"))
    change = difference(before, after)
    divergence = cells.value(name, dict)
    return {
        "divergence": divergence,
        "kept": min(divergence, key=lambda step: divergence[step]),
        "nats": change.nats,
        "standard_error": change.standard_error,
    }


def _losses(cells: Cells, name: str) -> list[Perplexity]:
    return cells.perplexities(name, list)


if __name__ == "__main__":
    fire.Fire(main)

"""Refit and then distillation on the real small model: what minutes bring, on which text.

Layers are removed, the rest is refitted on windows of the book, of another text and of the model's
own samples, and then learns by LoRA what the original model predicts, on windows of the same three
that the refit did not read. It is judged after each step on held-out chapters, on the half of the
second text that nothing was fitted on, and on other texts.

    python benchmarks/studies/distillation.py --also FILE --others FILE --out distillation.json

Texts are as in ``healing.py``. Own samples are kept beside the file, and a later run reads them
again. The seconds are those of healing: the original model's predictions, the refit and the
training with its validation, without the judging between them. Those of writing the own samples
are there, too, and do not count: a model writes them once for all its prunings.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from functools import partial
from io import StringIO
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.judging import (
    Windows,
    cut,
    halves,
    judge,
    judged_by,
    row,
    windows_to_cut,
    without_shared,
)
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.healing import table
from benchmarks.studies.scoring import build
from short_gpt import ShortHFModel, heal_lora, heal_refit, open_model, own_samples
from short_gpt.data import demo, without_overlap
from short_gpt.healing import Distillation, HealingWindows, recipe_for
from short_gpt.models.decoder import in_own_dtype

LAYERS = (10, 12, 13, 14, 15, 16, 17, 18)  # the automatic choice's 8, see `choices.py`
SECONDS = 900.0  # that refit and distillation may take on two cores


def main(
    layers: Sequence[int] = LAYERS,
    count: int = 24,
    own: int = 96,
    steps: int = 140,
    size: int = 512,
    also: str | None = None,
    others: str | None = None,
    judged: int = 16,
    mixed: bool = False,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        layers: to remove.
        count: windows of each text to refit on, and twice as many own samples.
        own: samples that the model writes; the rest of them is trained on.
        steps: of training, each of one window.
        size: tokens of every window to learn from.
        also, others: as in ``healing.py``.
        judged: windows of held-out chapters to judge by, and half as many of each other text.
        mixed: heal with matrix products in bfloat16; all is judged in float32.
        out, overwrite: the JSON file.
    """
    begin(out, overwrite=overwrite)
    meta = build()
    every = judged_by(meta, also, others, judged)
    book = next(iter(every))
    kinds = {kind: read if kind == book else read[: judged // 2] for kind, read in every.items()}
    evaluation = [w for read in kinds.values() for w in read]
    costs, samples, beside = {}, list[list[int]](), Path(out or "distillation.json")
    write = partial(own_samples, open_model(str(demo.gguf_file())), own, size, beside=beside)
    writing = seconds(lambda: samples.extend(write()))
    texts = [demo.bible("calibration"), *([[halves(also)[0]]] if also else [])]
    read = [cut(meta, text, count + windows_to_cut(steps), size) for text in texts]
    refitted_on, learning = divided([*read, samples], [count, count, 2 * count], steps, evaluation)
    short = ShortHFModel.from_meta(str(demo.checkpoint()), device="cpu", dtype="float32")
    changes = {"steps": steps, "size": size, "batch_size": 1, "eval_every": steps}
    recipe = recipe_for(short.trainable().config, "small", **changes)
    found = {"whole": judge(short, kinds)}
    with tempfile.TemporaryDirectory() as folder:
        with short.without_layers(layers):
            found["cut"] = judge(short, kinds)
        teacher = Distillation(folder, short, [*learning.training, *learning.validation])
        short.decoder.mixed = mixed
        costs["teacher"] = seconds(teacher.fill)
        costs["refit"] = seconds(lambda: heal_refit(short, layers, refitted_on))
        with in_own_dtype(short.decoder):
            found["refit"] = judge(short, kinds)
        learned = teacher
        parts = (learning.training, learning.validation, evaluation)
        costs["distill"] = seconds(
            lambda: heal_lora(short, *parts, recipe=recipe, distillation=learned)
        )
        with in_own_dtype(short.decoder):
            found["distill"] = judge(short, kinds)
    rows = {name: row(parts, found["whole"], found["cut"]) for name, parts in found.items()}
    print(table(rows, {}))
    print(", ".join(f"{name} {cost:.0f} s" for name, cost in costs.items()))
    total = sum(costs.values())
    missed = [f"{total:.0f} s, at most {SECONDS:.0f}"] if total > SECONDS else []
    content = {"layers": list(layers), "windows": len(refitted_on), "own_samples": len(samples)}
    content |= {"windows_trained_on": len(learning.training), "recipe": asdict(recipe)}
    content |= {"mixed": mixed, "rows": rows, "seconds": costs, "seconds_of_writing": writing}
    finish("distillation", missed, content, out=out, overwrite=overwrite)


def divided(
    kinds: Sequence[Windows], counts: Sequence[int], steps: int, judged: Windows
) -> tuple[Windows, HealingWindows]:
    """Windows to refit on, so many of each kind; and of the rest, by turns, those to train on."""
    firsts = [w for own, count in zip(kinds, counts, strict=True) for w in own[:count]]
    fitted = list(without_overlap(firsts, judged)[0])
    random.Random(0).shuffle(fitted)  # the refit holds out every eighth
    rests = [own[count:] for own, count in zip(kinds, counts, strict=True)]
    turns = [w for group in zip_longest(*rests) for w in group if w is not None]
    return fitted, without_shared(turns[: windows_to_cut(steps)], judged, steps)


def seconds(run: Callable[[], object]) -> float:
    """That it takes; what it shows is left out."""
    started = time.perf_counter()
    with redirect_stderr(StringIO()):
        run()
    return time.perf_counter() - started


if __name__ == "__main__":
    fire.Fire(main)

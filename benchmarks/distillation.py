"""Refit and then distillation on the real small model: what minutes bring, on which text.

Layers are removed, what is left is refitted on windows of the book and of another text, and then
learns by LoRA what the whole model predicts on more of both. It is judged behind each step on
held-out chapters, on the half of the second text that nothing was fitted on, and on other texts.

    python benchmarks/distillation.py --also FILE --others FILE --out distillation.json

Texts are as in ``healing.py``. The seconds are those of healing: the teacher's predictions, the
refit and the training with its validation, without the judging between them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO

import fire
from distilled import apart, wanted
from healing import Windows, cut, fitted_on, halves, judge, judged_by, row, table
from outcome import begin, finish
from scoring import build

from short_gpt import ShortHFModel, ShortLlama, heal_lora, heal_refit
from short_gpt.data import demo
from short_gpt.healing import CachedTeacher, Distillation, Learning, recipe_for

LAYERS = (3, 12, 13, 14, 15, 16, 17, 18)  # greedy search's 8, see `compare`
SECONDS = 900.0  # that refit and distillation may take on two cores


def main(
    layers: Sequence[int] = LAYERS,
    count: int = 34,
    aim: float = 0.5,
    steps: int = 116,
    size: int = 512,
    also: str | None = None,
    others: str | None = None,
    judged: int = 16,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        layers: that go.
        count: windows of 1024 tokens of each text to refit on.
        aim: of the refit.
        steps: of training, each of one window of ``size`` tokens.
        size: of those.
        also, others: as in ``healing.py``.
        judged: windows of held-out chapters to judge by, and half as many of each other text.
        out, overwrite: the JSON file.
    """
    begin(out, overwrite=overwrite)
    meta = build()
    refitted_on, every = fitted_on(meta, count, count, also), judged_by(meta, also, others, judged)
    book = next(iter(every))
    kinds = {kind: read if kind == book else read[: judged // 2] for kind, read in every.items()}
    short = ShortHFModel.from_meta(str(demo.checkpoint()), device="cpu", dtype="float32")
    evaluation = [w for read in kinds.values() for w in read]
    learning = learning_on(meta, steps, size, also, evaluation)
    changes = {"steps": steps, "size": size, "batch": 1, "eval_every": steps // 2}
    recipe = recipe_for(short.trainable().config, "small", **changes)
    found, costs = {"whole": judge(short, kinds)}, {}
    with tempfile.TemporaryDirectory() as folder:
        with short.without_layers(layers):
            found["cut"] = judge(short, kinds)
        teacher = CachedTeacher(folder, short, [*learning.training, *learning.validation])
        costs["teacher"] = seconds(teacher.fill)
        costs["refit"] = seconds(lambda: heal_refit(short, layers, refitted_on, step_size=aim))
        found["refit"] = judge(short, kinds)
        learned = Distillation(teacher)
        texts = (learning.training, learning.validation, evaluation)
        costs["distill"] = seconds(
            lambda: heal_lora(short, *texts, recipe=recipe, distillation=learned)
        )
        found["distill"] = judge(short, kinds)
    rows = {name: row(parts, found["whole"], found["cut"]) for name, parts in found.items()}
    print(table(rows, {}))
    print(", ".join(f"{name} {cost:.0f} s" for name, cost in costs.items()))
    total = sum(costs.values())
    missed = [f"{total:.0f} s, at most {SECONDS:.0f}"] if total > SECONDS else []
    content = {"layers": list(layers), "windows": len(refitted_on), "aim": aim}
    content |= {"recipe": asdict(recipe)}
    content |= {"rows": rows, "seconds": costs}
    finish("distillation", missed, content, out=out, overwrite=overwrite)


def learning_on(
    short: ShortLlama, steps: int, size: int, also: str | None, evaluation: Windows
) -> Learning:
    """Windows of both texts in turn to train on, and others to validate by."""
    texts = [demo.bible("calibration"), *([[halves(also)[0]]] if also else [])]
    read = [cut(short, text, -(-wanted(steps) // len(texts)), size) for text in texts]
    turns = [w for group in zip(*read, strict=False) for w in group]
    return apart(turns, evaluation, steps)


def seconds(run: Callable[[], object]) -> float:
    """That it takes; what it shows is left out."""
    started = time.perf_counter()
    with redirect_stderr(StringIO()):
        run()
    return time.perf_counter() - started


if __name__ == "__main__":
    fire.Fire(main)

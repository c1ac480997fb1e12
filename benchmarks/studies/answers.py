"""How many training tokens bring answers back: refit, then distillation, judged by answers.

Layers are removed, the others are refitted on what the original model writes, half of it answers to
prompts, and then learn its predictions on the same windows, for a number of tokens. The learning
rate's schedule ends there, and so every number is a training of its own. Each model is judged by
its KL divergence from the original on WikiText-2 and on the original's answers to 40 questions, by
its own answers to these, and by word problems. The prompts are `data.prompts`; a problem that
shares half of its words in a row with one of them would be left out, and none does.

    python benchmarks/studies/answers.py --source tasks --wikitext wikitext2_test.txt \
        --model smollm2 --layers 10,12,13,14,15,16,17,18 --tokens 0,50000 --out answers.json

The same command, with more numbers, goes on: what is written, measured and trained is in ``files``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire

from benchmarks.lib import word_problems
from benchmarks.lib.judging import VALIDATED, cut
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.lib.word_problems import ABLE, HARD
from short_gpt import ShortHFModel, own_samples
from short_gpt.data import without_overlap
from short_gpt.evaluation.answers import answer_windows, ask, questions
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.healing import HealingJob, HealingWindows, recipe_for
from short_gpt.healing.choosing import ResultCache
from short_gpt.healing.job import clear
from short_gpt.healing.settings import Recipe
from short_gpt.models.decoder import in_own_dtype
from short_gpt.runtime.digest import json_digest, windows_digest
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import FASTER, OpenOptions

LAYERS = (10, 12, 13, 14, 15, 16, 17, 18)  # of SmolLM2, the automatic choice's 8
SIZE, REFITTED, JUDGED, WRITTEN = 512, 64, 16, 24  # tokens; windows; windows; tokens of an answer
EVALUATIONS = 8  # of a training
READING = OpenOptions(device="cpu", dtype="float32", precision=FASTER)


def main(
    source: str,
    wikitext: str,
    model: str = "smollm2",
    layers: Sequence[int] = LAYERS,
    tokens: Sequence[int] = (0, 50_000, 200_000, 800_000, 1_600_000),
    own: int = 200,
    problems: int = 100,
    files: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        source: folder with svamp.jsonl and gsm8k.jsonl.
        model: a name of `real_models.MODELS`.
        layers: to remove.
        tokens: to train on, in all; 0 is the refit alone.
        own: windows that the original model writes, once.
        problems: of each kind, from the first.
        files: folder of the state; answers-MODEL if not given.
        changes: of the recipe "small", as in ``--learning_rate 1e-4``.
    """
    begin(out, overwrite=overwrite)
    folder = Path(files or f"answers-{model}")
    run = Run(str(MODELS[model]()), folder, source, Path(wikitext), own, problems)
    rows = {"original": run.judged("original")}
    with run.short.without_layers(layers):
        rows["pruned"] = run.judged(f"pruned {layers}")
    for count in sorted([tokens] if isinstance(tokens, int) else tokens):
        rows[f"{count}"] = run.healed(tuple(sorted(layers)), count, changes)
        print(f"{count} tokens: {rows[f'{count}']}", flush=True)
    content = {"model": model, "layers": sorted(layers), "own_windows": [len(run.training), SIZE]}
    finish("answers", [], content | {"rows": rows}, out=out, overwrite=overwrite)


class Run:
    """The original model, what it writes and is judged by; every row is measured once."""

    def __init__(
        self, model: str, folder: Path, source: str, wikitext: Path, own: int, problems: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        short = open_trainable(model, READING.as_begun(folder / "state.json"))
        assert isinstance(short, ShortHFModel)
        self.short = short
        self.asked = questions()
        self.problems = {n: word_problems.read(source, n, problems) for n in word_problems.NAMES}
        with in_own_dtype(short.decoder):
            replies = ask(short, self.asked, max_new_tokens=WRITTEN)
        judged = cut(short, [wikitext.read_text("utf-8")], JUDGED, SIZE)
        self.texts = {"wikitext": judged, "answers": [*answer_windows(replies)]}
        every = [*chain(*self.texts.values())]
        self.reference = Reference(short.decoder)
        with in_own_dtype(short.decoder):
            self.reference.read(every)
        asks = [short.prompt_ids(p.question) for each in self.problems.values() for p in each]
        written = own_samples(short, own + VALIDATED, SIZE, beside=folder / "own")
        free, _ = without_overlap(written, [*every, *asks])
        self.validation = free[-VALIDATED:]
        self.training, _ = without_overlap(free[:-VALIDATED], self.validation)
        identity = short.identity() | {"judged": windows_digest(every)}
        identity |= {"training": windows_digest(self.training)}
        identity |= {"problems": json_digest(self.problems)}
        self.cells = ResultCache(StateFile(folder / "state.json", identity, every=0.0))

    def judged(self, name: str) -> dict[str, Any]:
        """KL divergence and equal top tokens by kind of text; questions and problems solved."""
        return self.cells.value(name, self._judge)

    def _judge(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        with in_own_dtype(self.short.decoder):
            for kind, windows in self.texts.items():
                found = perplexity(
                    self.short.decoder, [[w] for w in windows], reference=self.reference
                )
                assert found.kld is not None and found.same_top is not None
                row[kind] = {"kld": found.kld.value, "interval_95": found.kld.interval()}
                row[kind]["same_top"] = found.same_top.value
            replies = ask(self.short, self.asked, max_new_tokens=WRITTEN)
            row["right"] = [bool(reply.right) for reply in replies]
            for kind in self._able:
                row[kind] = word_problems.asked(self.short, self.problems[kind])["exact_match"]
        return row

    @property
    def _able(self) -> Sequence[str]:
        """Kinds of which the original solves some."""
        if "original" not in self.cells:
            return word_problems.NAMES
        solved = self.cells.value("original", dict)[HARD]
        able = sum(solved) >= ABLE * len(solved)
        return [kind for kind in word_problems.NAMES if kind != HARD or able]

    def healed(self, layers: tuple[int, ...], tokens: int, changes: Mapping[str, Any]) -> Any:
        """Judges the model without layers, refitted, and trained on so many tokens."""
        name = f"{tokens} tokens without {[*layers]}, {json_digest(dict(changes))}"
        return self.cells.value(name, partial(self._heal, layers, tokens, changes))

    def _heal(
        self, layers: tuple[int, ...], tokens: int, changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        steps: dict[str, Any] = {"refit": None}
        if tokens:
            steps["distill"] = recipe = self.recipe(tokens, changes)
        windows = HealingWindows(self.training, self.validation, self.texts["answers"])
        work_dir = self.folder / f"{tokens}-{json_digest([layers, dict(changes)])[:8]}"
        job = HealingJob(
            self.short, windows, layers, steps=steps, max_windows=REFITTED, work_dir=work_dir
        )
        started = time.perf_counter()
        with ExitStack() as undos:
            evidence = job.run(undos)
            done = {"seconds": time.perf_counter() - started, **self._judge()}
        clear(work_dir)
        if tokens:
            trained = evidence.how
            done |= {"recipe": asdict(recipe), "tokens": trained["tokens"]}
            done |= {name: trained[name] for name in ("kept_step", "divergence")}
        return done

    def recipe(self, tokens: int, changes: Mapping[str, Any]) -> Recipe:
        """The recipe "small" for so many tokens, evaluated `EVALUATIONS` times."""
        small = recipe_for(self.short.trainable().config, "small", **changes)
        steps = max(EVALUATIONS, tokens // (SIZE * small.batch_size))
        return replace(small, steps=steps, eval_every=-(-steps // EVALUATIONS))


if __name__ == "__main__":
    fire.Fire(main)

"""What removed layers cost beside perplexity: tasks, and what a reader notices.

Layers go by Block Influence, as cut, refitted, and refitted and then distilled. Tasks are
lm-eval's own over local documents (`task_files`); every change is paired over the documents. Beside
them: the perplexity of held-out chapters and of WikiText-2, how many greedy tokens equal the whole
model's, how often completions repeat themselves, and the loss of right answers as an assistant's
turns in the chat template.

    python benchmarks/studies/tasks.py --source tasks/ --wikitext wikitext2_test.txt --out FILE

Layers are chosen and refits fitted on the book and on the first half of WikiText-2's text, and on
more of both what is left is distilled. With ``--state`` it continues where it was.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire
import torch

from benchmarks.lib import task_files
from benchmarks.lib.judging import (
    Windows,
    both_held_out,
    cut,
    halves,
    windows_to_cut,
    without_shared,
)
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.task_results import CLOSE, against_theirs, metrics, text_changes
from benchmarks.studies.scoring import build
from short_gpt import ShortHFModel, ShortLlama, choose
from short_gpt.data import demo
from short_gpt.evaluation.perplexity import Perplexity, Sample, check_loss, window_perplexities
from short_gpt.evaluation.tasks import TaskRun, TaskSuite
from short_gpt.healing import (
    Distillation,
    HealingWindows,
    Recipe,
    RefitSettings,
    heal_lora,
    heal_refit,
    recipe_for,
    refit,
)
from short_gpt.healing.choosing import ResultCache
from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile, joined

PROMPT, LONG = 32, 32  # tokens of a prompt, and of what is completed
Turn = tuple[list[int], list[int]]  # token ids before an answer, and of the answer


class Distiller:
    """Refits and distils the demo's model, from what the whole one predicts.

    Training goes through transformers; the result is saved in the demo's own format and opened as
    the whole model is, so that both are measured by the same program.

    Args:
        teacher: the whole model; asked once, when the first model is made.
        fitted: windows of the refit.
        learning: windows of the distillation.
        recipe: of it.
        folder: keeps what the whole model predicts.
    """

    def __init__(
        self,
        teacher: ShortLlama,
        fitted: Windows,
        learning: HealingWindows,
        recipe: Recipe,
        folder: Path,
    ) -> None:
        self.fitted, self.learning, self.recipe = fitted, learning, recipe
        self._whole, self._folder = teacher, folder
        self._predictions: Distillation | None = None

    def made(self, layers: Sequence[int]) -> tuple[ShortLlama, dict[str, object]]:
        """The model without some layers, refitted and distilled; and how the training went."""
        distillation = self._teacher()
        short = ShortHFModel.from_meta(demo.checkpoint(), device="cpu")
        heal_refit(short, layers, self.fitted)
        read = self.learning
        windows = (read.training, read.validation, read.evaluation)
        healed = heal_lora(short, *windows, recipe=self.recipe, distillation=distillation)
        with tempfile.TemporaryDirectory() as folder:
            return build(short.save(Path(folder, "distilled"))), healed.to_dict()

    def _teacher(self) -> Distillation:
        """What the whole model predicts."""
        if self._predictions is None:
            windows = [*self.learning.training, *self.learning.validation]
            self._predictions = Distillation(self._folder, self._whole, windows)
            self._predictions.fill()
        return self._predictions


class Run:
    """The model with what it is judged by, every number measured once.

    Args:
        source: folder of the tasks' documents.
        wikitext: file of WikiText-2's test text.
        documents: of each task.
        learned, judged: windows of ``size`` tokens of each text.
        steps: of a distillation, each of two windows.
        state: file to continue from.
    """

    def __init__(
        self,
        source: str,
        wikitext: str,
        *,
        documents: int,
        learned: int,
        judged: int,
        size: int,
        steps: int,
        state: str | None,
    ) -> None:
        self.short, self.size = build(), size
        first, second = halves(wikitext)
        each = learned + -(-windows_to_cut(2 * steps) // 2)
        texts = (demo.bible("calibration"), [first])
        parts = [cut(self.short, text, each, size) for text in texts]
        mix = [w for pair in zip(*parts, strict=True) for w in pair]
        self.learned = both_held_out(mix[: 2 * learned])
        self.kinds: dict[str, Windows] = {
            "held-out chapters": cut(self.short, demo.bible("held_out"), judged, size),
            "WikiText-2": cut(self.short, [second], judged, size),
        }
        apart = [w for kind in self.kinds.values() for w in kind]
        learning = without_shared(mix[2 * learned :], apart, 2 * steps)
        self.folder = tempfile.TemporaryDirectory()
        names = task_files.write(source, self.folder.name)
        paths = task_files.paths(self.folder.name, names)
        self.suite = TaskSuite(paths, limit=documents, batch_size=8)
        self.theirs = self._theirs()
        recipe = recipe_for(self.theirs.trainable().config, "small", size=size, steps=steps)
        self.distiller = Distiller(
            self.short, self.learned, learning, recipe, Path(self.folder.name, "teacher")
        )
        self.turns = self._turns(Path(source), documents)
        judge = {kind: [list(w) for w in read] for kind, read in self.kinds.items()}
        asked = [path.read_text(encoding="utf-8") for path in sorted(Path(source).glob("*.jsonl"))]
        learned = [list(w) for w in [*self.learned, *learning.training, *learning.validation]]
        settings = [asdict(recipe), vars(RefitSettings())]
        read = json_digest([learned, judge, self.turns, asked, names, documents, settings])
        identity = joined(self.short.identity(), {"read": read})
        self.state = None if state is None else StateFile(state, identity)
        self.cells = ResultCache(self.state)

    def _theirs(self) -> ShortHFModel:
        """The same model by transformers, from the GGUF file."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = {"gguf_file": demo.gguf_file().name}
        folder = demo.gguf_file().parent
        model = AutoModelForCausalLM.from_pretrained(folder, **place, dtype="float32").eval()
        return ShortHFModel(model, tokenizer=AutoTokenizer.from_pretrained(folder, **place))

    def _turns(self, source: Path, documents: int) -> list[tuple[list[int], list[int]]]:
        """Right answers of ARC-Easy as an assistant's, of questions behind those of the task."""
        lines = (source / "arc_easy.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[documents : documents + 32]]
        dialogs = [
            [
                {"role": "user", "content": row["query"].removeprefix("Question: ")},
                {"role": "assistant", "content": row["choices"][row["gold"]]},
            ]
            for row in rows
        ]
        return [turn(self.theirs.tokenizer, dialog) for dialog in dialogs]

    def prompts(self) -> list[list[int]]:
        """Beginnings of windows of both texts."""
        return [list(w[:PROMPT]) for kind in self.kinds.values() for w in kind]

    def measured(self, name: str, short: ShortLlama | None = None) -> dict[str, object]:
        """All that is measured of a model as it is now; None is `short`, cut or refitted."""
        short = short or self.short
        completions = self.cells.value(
            f"completions {name}", lambda: [short.greedy(p, LONG) for p in self.prompts()]
        )
        run = self.cells.value(f"tasks {name}", lambda: asdict(self.suite.documents(short)))
        parts = {
            kind: self.cells.perplexities(
                f"{kind} {name}", partial(window_perplexities, short.decoder, read, progress=False)
            )
            for kind, read in self.kinds.items()
        }
        turns = self.cells.perplexities(
            f"turns {name}", lambda: turn_losses(short.decoder, self.turns)
        )
        return {
            "run": TaskRun.from_dict(run),
            "parts": {**parts, "turns": turns},
            "texts": completions,
        }

    def refitted(self, layers: list[int], name: str) -> dict[str, object]:
        """The same of the model without some layers, refitted, once."""
        with self.short.without_layers(layers):
            if f"turns {name}" in self.cells:
                return self.measured(name)
        made = refit.fit(self.short, layers, self.learned)
        with self.short.without_layers(layers):
            undo = refit.apply_refit(self.short, made)
            try:
                return self.measured(name)
            finally:
                undo()

    def distilled(self, layers: list[int], name: str) -> dict[str, object]:
        """The same of the model that is refitted and distilled, and how the training went."""
        short, training = None, f"training {name}"
        if f"turns {name}" not in self.cells:
            short, how = self.distiller.made(layers)
            self.cells.value(training, lambda: how)
        return {**self.measured(name, short), "training": self.cells.value(training, dict)}


def main(
    source: str,
    wikitext: str,
    counts: Sequence[int] = (2, 4, 8),
    documents: int = 50,
    learned: int = 8,
    judged: int = 6,
    size: int = 256,
    steps: int = 40,
    state: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    sizes = {"documents": documents, "learned": learned, "judged": judged, "size": size}
    sizes["steps"] = steps
    run = Run(source, wikitext, **sizes, state=state)
    run.short.measure(run.learned)
    sets = {n: choose(run.short.importance, n) for n in counts}
    whole = run.measured("whole")
    same = run.cells.value("hf", lambda: against_theirs(whole["run"], run.suite, run.theirs))
    del run.theirs
    found = {"whole": whole}
    for n, layers in sets.items():
        with run.short.without_layers(layers):
            found[f"{n} less"] = run.measured(f"cut {n}")
        found[f"{n} less, refitted"] = run.refitted(layers, f"refit {n}")
        found[f"{n} less, distilled"] = run.distilled(layers, f"distil {n}")
    rows = {name: row(one, whole) for name, one in found.items()}
    print(table(rows))
    print(f"lm-eval's hf on the same documents: {same}")
    if run.state is not None:
        run.state.clear()
    missed = [] if same["answers_equal"] and same["nats"] < CLOSE else ["the adapters differ"]
    content = {**sizes, "layers": {str(n): layers for n, layers in sets.items()}}
    content["training"] = {
        name: one["training"] for name, one in found.items() if "training" in one
    }
    content |= {"prompt": PROMPT, "completion": LONG, "rows": rows, "hf": same}
    finish("tasks", missed, content, out=out, overwrite=overwrite)


def row(found: dict, whole: dict) -> dict[str, object]:
    """One model: metrics with their changes, paired, and what a reader notices."""
    pairs = list(zip(whole["texts"], found["texts"], strict=True))
    return {
        "tasks": metrics(found["run"].documents, whole["run"].documents),
        "texts": text_changes(found["parts"], whole["parts"]),
        "same_tokens": [leading(a, b) for a, b in pairs],
        "repetition": [repetition(b) if len(b) >= 4 else 0.0 for _, b in pairs],
    }


def leading(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two completions share from their beginning on."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of a text's n-grams that stood in it before: 0 for none, near 1 for a loop."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return (len(grams) - len({*grams})) / len(grams)


def turn(tokenizer: Any, dialog: Sequence[Mapping[str, str]]) -> Turn:
    """The last message of a dialog, the assistant's, as an answer under the chat template."""
    whole = tokenizer.apply_chat_template(dialog, tokenize=False, add_generation_prompt=False)
    before = tokenizer.apply_chat_template(dialog[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(before) or whole == before:
        raise ValueError("this chat template writes a dialog otherwise once it is answered")
    texts = (before, whole[len(before) :])
    first, second = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts)
    return first, second


@torch.no_grad()
def turn_losses(decoder: Decoder, turns: Sequence[Turn]) -> list[Perplexity]:
    """The loss of every answer, given what stands before it."""
    losses = []
    for before, answer in turns:
        tokens, _ = pad([[*before, *answer]], decoder)
        logits = decoder.logits(tokens)[0, len(before) - 1 : -1]  # (S, V), S of the answer
        each = torch.nn.functional.cross_entropy(
            logits.float(), tokens[0, len(before) :], reduction="none"
        )
        nats = float(each.double().sum())
        check_loss(nats)
        losses.append(Perplexity.of([Sample(None, nats, len(answer))]))
    return losses


def table(rows: dict[str, dict]) -> str:
    """A row for every measure, a column for every model."""
    first = rows["whole"]
    lines = [f"{'':<28}" + "".join(f"{name:>20}" for name in rows)]
    for name in first["tasks"]:
        cells = [r["tasks"][name] for r in rows.values()]
        shown = [f"{c['value']:.3f} ({c['standard_error']:.3f})" for c in cells]
        lines.append(f"{name:<28}" + "".join(f"{s:>20}" for s in shown))
    for kind in first["texts"]:
        cells = [r["texts"][kind] for r in rows.values()]
        shown = [f"{c['perplexity']:.2f} ({c['standard_error']:.3f})" for c in cells]
        lines.append(f"{kind:<28}" + "".join(f"{s:>20}" for s in shown))
    for name in ("same_tokens", "repetition"):
        means = [sum(r[name]) / len(r[name]) for r in rows.values()]
        lines.append(f"{name:<28}" + "".join(f"{m:>20.3f}" for m in means))
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)

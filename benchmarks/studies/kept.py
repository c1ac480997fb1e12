"""The share of a model's mean over tasks that pruned and healed models keep, and its error.

A quarter of the layers goes, chosen in three ways: by Block Influence, by greedy search, and by the
loss of the refitted model (`choose_healed`). Each set is pruned, healed by others' methods, by the
library's refit on three kinds of text, and distilled. Tasks are lm-eval's own over local documents
(`task_files`), word problems are answered in the chat template (gsm8k's by pruned models only if
the original solves one in twenty), and texts are held-out chapters,
WikiText-2's second half and novels. Changes are paired over documents or windows.

    python benchmarks/studies/kept.py --source tasks --also wikitext2_test.txt \
        --others lambada_passages.txt --out kept.json

All closed forms and layerwise learn from the same windows; distillation trains on others of the
same texts. These are a quarter of the book, a quarter of WikiText-2's first half, a half own
samples; "refit-text" and "refit-own" read as many of one kind. None shares text with what judges:
no 63 tokens in a row of a text, a question or an answer, of a shorter one no half, from 8 tokens
on. The tasks are fixed, so the variance of their mean is the sum of their variances over T^2. What
is measured stands in a state beside the file, from which the same command goes on: ``--rows`` and
``--sets`` measure some, and the file holds all rows of these sets that are there.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire
import torch

from benchmarks.baselines import peer_maps
from benchmarks.lib import task_files, word_problems
from benchmarks.lib.judging import Windows, cut, divided, halves, judged_by, windows_to_cut
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.lib.shared_contexts import SharedContexts
from benchmarks.lib.task_results import (
    CLOSE,
    Documents,
    above_guesses,
    against_theirs,
    change,
    judging,
    kept,
    metrics,
    ranks,
    summed,
    table,
    text_changes,
    unflattered,
)
from short_gpt import ShortHFModel, choose, heal_lora, heal_refit, open_model, own_samples
from short_gpt.data import demo, without_overlap
from short_gpt.evaluation.perplexity import window_perplexities
from short_gpt.evaluation.tasks import TaskSuite
from short_gpt.healing import Distillation, choose_healed, recipe_for
from short_gpt.healing.choosing import ResultCache
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile

SETS = ("bi", "greedy", "auto")
MIXED = {"refit-mixed": "refit", "distilled-mixed": "distilled"}  # products in bfloat16
REFITS = {"refit-text": "text", "refit-own": "own", "refit": "mix"}  # and what they read
ROWS = ("pruned", *peer_maps.KINDS, "replaceme", "layerwise", *REFITS, "distilled")
MIXED_ROWS = tuple(f"auto {row}" for row in MIXED)  # measured for one set alone
TASKS = (*task_files.OWN, *task_files.MORE)
Case = tuple[str, list[int]]  # a row and its layers
Pieces = dict[tuple[int, ...], set[tuple[int, ...]]]  # by their first tokens
CHECKED = 5  # documents of a task on which two programs are compared
FEW = 4  # windows that the greedy search reads
RUN = 32  # tokens: where 63 in a row are a document's, one of its pieces of 32 is among them
LEAST = 8  # tokens of a piece, as in `without_overlap`


def main(
    source: str,
    also: str,
    others: str,
    model: str = "smollm2",
    rows: str | Sequence[str] = (*ROWS, *MIXED_ROWS),
    sets: str | Sequence[str] = SETS,
    bi: Sequence[int] | None = None,
    greedy: Sequence[int] | None = None,
    auto: Sequence[int] | None = None,
    documents: int | Sequence[int] = 295,
    problems: int = 100,
    count: int = 48,
    own: int = 96,
    steps: int = 140,
    judged: int = 16,
    size: int = 512,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the tables, and writes the JSON file if ``out`` is given.

    Args:
        source: folder of the tasks' files.
        also, others: texts, as in ``healing.py``; the first half of ``also`` is learned from.
        model: a name of ``real_models.py``.
        rows, sets: to measure, of `ROWS`, `MIXED` and `SETS`; a row of one set has its name, "bi
            refit".
        bi, greedy, auto: layers of a set, where they are known; else they are chosen.
        documents: of each task, from the first; a row of rising numbers asks those up to each
            number after the other, so that a result can grow. With 295, a pilot foretold, the
            standard error of the change of the mean is below 0.01.
        problems: word problems of each kind.
        count: windows that closed forms and layerwise learn from.
        own: samples that the model writes, once.
        steps: of the distillation, each of one window.
        judged: windows of each text to judge by.
        size: tokens of a window.
    """
    begin(out, overwrite=overwrite)
    rows, sets = (x.split(",") if isinstance(x, str) else list(x) for x in (rows, sets))
    counts = {"count": count, "own": own, "steps": steps, "judged": judged, "size": size}
    texts = {"source": source, "also": also, "others": others}
    run = Run(model, **texts, **counts, state=Path(f"{out or 'kept.json'}.state"))
    run.problems = problems
    given = {"bi": bi, "greedy": greedy, "auto": auto}
    chosen = {name: sorted(given[name] or run.chosen(name)) for name in dict.fromkeys(sets)}
    ends = [documents] if isinstance(documents, int) else list(documents)
    if ends != sorted({*ends}):
        raise ValueError(f"documents {ends}: expected rising numbers")
    run.blocks = run.divided(ends)
    print(f"{ends[-1]} documents of each task, or all; layers {chosen}")
    found, agreement, pairs = rows_of(run, chosen, rows)
    print(table(found))
    print("\n".join(f"Kendall's tau of loss and mean, {k}: {v}" for k, v in agreement.items()))
    same = run.same_as_theirs()
    differs = not (same["answers_equal"] and same["nats"] < CLOSE)
    content = {"model": model, "layers": chosen, "documents": ends[-1]}
    content |= {"problems": problems, **counts, "recipe": asdict(run.recipe)}
    content |= {"rows": found, "pairs": pairs, "kendall": agreement, "hf": same}
    finish("kept", ["the adapters differ"] * differs, content, out=out, overwrite=overwrite)


def rows_of(
    run: Run, chosen: Mapping[str, list[int]], rows: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Measures rows of all sets; returns every row that is there, `ranks`, and pairs of rows."""
    cases = {"original": ("original", list[int]())}
    every = (*ROWS, *MIXED)
    cases |= {f"{s} {row}": (row, layers) for s, layers in chosen.items() for row in every}
    for name, (row, layers) in cases.items():
        if row == "original" or {name, row} & {*rows}:
            run.measure(row, layers)
    found = {name: run.summary(*case) for name, case in cases.items() if not run.missing(*case)}
    once = [name for name in found if cases[name][0] not in MIXED]
    firsts = {str(cases[name]): name for name in reversed(once)}.values()  # each model once
    pairs = [
        (f"{second} {row}", f"{first} {row}")
        for first, second in combinations(chosen, 2)
        for row in ("pruned", "refit", "distilled")
    ]
    pairs += [("bi pruned", f"auto {row}") for row in ("refit", "distilled")]
    pairs += [(f"{name} distilled", f"{name} pruned") for name in chosen]
    pairs += [
        (f"{name} {mixed}", f"{name} {row}") for name in chosen for mixed, row in MIXED.items()
    ]
    known = [pair for pair in pairs if {*pair} <= found.keys()]
    apart = {f"{a} less {b}": run.apart([cases[a]], [cases[b]]) for a, b in known}
    for a, b in combinations(chosen, 2):  # what the refit gains
        after, before = ((f"{x} refit", f"{y} pruned") for x, y in ((a, b), (b, a)))
        if {*after, *before} <= found.keys():
            gains = run.apart([cases[x] for x in after], [cases[x] for x in before])
            apart[f"gain of {a} refit less that of {b} refit"] = gains
    return found, ranks({name: found[name] for name in firsts}), apart


class Run:
    """The original model, what others learn from and are judged by; every cell measured once."""

    blocks: Mapping[str, TaskSuite] = {}  # some documents of a task, by their name
    problems = 0  # of each kind
    _teacher: Distillation | None = None
    _undo: Callable[[], None] | None = None  # of maps

    def __init__(
        self, model: str, *, source: str, also: str, others: str, state: Path, **counts: int
    ) -> None:
        count, steps, size = (counts[name] for name in ("count", "steps", "size"))
        path = MODELS[model]()
        self.short, self.source, self.path = open_model(str(path), device="cpu"), source, state
        self.kinds = judged_by(self.short, also, others, counts["judged"], size)
        evaluation = [w for read in self.kinds.values() for w in read]
        asked = self._asked()
        samples = own_samples(self.short, counts["own"], size, chat=False, beside=state)
        limit = count + windows_to_cut(steps)
        read = [demo.bible("calibration"), [halves(also)[0]]]
        pools = [cut(self.short, text, limit, size) for text in read]
        book, wiki, samples = (
            [w for w in without_overlap(pool, evaluation)[0] if not holds(w, asked)]
            for pool in (*pools, samples)
        )
        parts = [count // 4, count // 4, count // 2]
        mix, self.learning = divided([book, wiki, samples], parts, steps, evaluation)
        text = [*book[: count // 2], *wiki[: count // 2]]
        random.Random(0).shuffle(text)  # the refit holds out every eighth
        self.texts: dict[str, Windows] = {"text": text, "own": samples[:count], "mix": mix}
        changes = {"steps": steps, "size": size, "batch_size": 1, "eval_every": steps}
        self.recipe = recipe_for(self.short.trainable().config, "small", **changes)
        self.tasks, self.folder = self.task_files()
        every = {**self.texts, **self.kinds, "learning": self.learning.training}
        content = [[[list(w) for w in own] for own in every.values()], counts]
        content += [Path(source, f"{n}.jsonl").read_text() for n in (*TASKS, *word_problems.NAMES)]
        identity = {**self.short.identity(), "read": json_digest(content)}
        self.cells = ResultCache(StateFile(state, identity, every=0.0))

    def _asked(self) -> Pieces:
        """Of all tasks and word problems: what a text that holds a copy has one of."""
        lines = []
        for name in (*TASKS, *word_problems.NAMES):
            lines += Path(self.source, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        shown = [parts(row) for row in map(json.loads, lines)]
        every = list({text: None for both in shown for own in both for text in own})
        read = self.short.tokenizer(every, add_special_tokens=False)["input_ids"]
        ids: dict[str, list[int]] = dict(zip(every, read, strict=True))
        asked: Pieces = {}
        for firsts, ends in shown:
            texts = [ids[text] for text in (*firsts, *ends)]
            texts += [ids[first] + ids[end] for first in firsts for end in ends]
            for piece in chain.from_iterable(map(pieces, texts)):
                asked.setdefault(piece[:LEAST], set()).add(piece)
        return asked

    def chosen(self, name: str) -> list[int]:
        """A quarter of the layers, by Block Influence, greedy search or the refitted loss."""
        short, mix, n = self.short, self.texts["mix"], round(len(self.short.kept) / 4)

        def choice(part: StateFile | None) -> list[int]:
            if name == "bi":
                return choose(short.measure(mix), n)
            if name == "greedy":
                return short.search(mix[:FEW], n, state=part).removed
            return choose_healed(short, mix, n, state=part).layers

        return self.cells.resumed(f"layers by {name}", choice)

    def task_files(self, start: int = 0) -> tuple[list[str], str]:
        """The tasks that have documents from `start` on, and the folder with these."""
        folder = Path(f"{self.path}.tasks{f'-from-{start}' if start else ''}")
        folder.mkdir(exist_ok=True)
        return task_files.write(self.source, folder, TASKS, start), str(folder)

    def suite(self, documents: int) -> TaskSuite:
        return TaskSuite(task_files.paths(self.folder, self.tasks), documents, batch_size=8)

    def divided(self, ends: Sequence[int]) -> dict[str, TaskSuite]:
        """The documents of each task up to the first end, and then between two ends."""
        blocks = {}
        for start, end in pairwise([0, *ends]):
            tasks, folder = self.task_files(start)
            which = f"{start} to {end}" if start else f"{end}"
            for task in tasks:
                paths = task_files.paths(folder, [task])
                suite = TaskSuite(paths, end - start, batch_size=8)
                blocks[f"{which} of {task}"] = suite
        return blocks

    def _plan(self, row: str, layers: Sequence[int]) -> dict[str, Callable[[ShortHFModel], Any]]:
        """What is measured of a model, by the names of cells."""
        name = f"{row} {layers}"
        plan: dict[str, Callable[[ShortHFModel], Any]] = {}
        for block, suite in self.blocks.items():
            plan[f"{name}: {block}"] = partial(documents_of, suite)
        for kind in self._kinds_of_problems(row):
            asked = word_problems.read(self.source, kind, self.problems)
            answer = partial(word_problems.asked, problems=asked)
            plan[f"{name}: {self.problems} of {kind}"] = lambda s, a=answer, k=kind: {k: a(s)}
        for kind, windows in self.kinds.items():
            plan[f"{name}: {kind}"] = lambda s, w=windows: window_perplexities(
                s.decoder, w, progress=False
            )
        return plan

    def _kinds_of_problems(self, row: str) -> list[str]:
        """All for the original; of another model, the hard ones only where the original can."""
        hard, able = word_problems.HARD, row == "original"
        if not able and (cell := f"original []: {self.problems} of {hard}") in self.cells:
            solved = self.cells.value(cell, dict)[hard]["exact_match"]
            able = sum(solved) / len(solved) >= word_problems.ABLE
        return [kind for kind in word_problems.NAMES if able or kind != hard]

    def missing(self, row: str, layers: Sequence[int]) -> list[str]:
        return [cell for cell in self._plan(row, layers) if cell not in self.cells]

    def measure(self, row: str, layers: Sequence[int]) -> None:
        """Measures what is missing of a row; a model that took training is kept meanwhile."""
        if not (missing := self.missing(row, layers)):
            return
        print(f"=== {row} {layers}: {len(missing)} cells", flush=True)
        begun, short, plan = time.perf_counter(), self.healed(row, layers), self._plan(row, layers)
        self._check_same(f"{row} {layers}", short)
        for cell in missing:
            is_text = cell.split(": ")[-1] in self.kinds
            take = self.cells.perplexities if is_text else self.cells.value
            take(cell, partial(plan[cell], short))
        self._file(row, layers).unlink(missing_ok=True)
        print(f"=== {row}: {time.perf_counter() - begun:.0f} s", flush=True)

    def _check_same(self, name: str, short: ShortHFModel) -> None:
        """A row that grows was healed again: its losses must be those that were measured."""
        for kind, windows in self.kinds.items():
            if (cell := f"{name}: {kind}") not in self.cells:
                continue
            (now,) = window_perplexities(short.decoder, windows[:1], progress=False)
            before = self.cells.perplexities(cell, list)[0]
            if abs(now.nats - before.nats) / now.tokens > CLOSE:
                raise ValueError(
                    f"{name}: healed again, it has {now.nats:.4f} nats on a window of {kind}, "
                    f"{before.nats:.4f} before; measure all its documents on one machine"
                )

    def _file(self, row: str, layers: Sequence[int]) -> Path:
        return Path(f"{self.path}.{row}-{'-'.join(map(str, layers))}.pt")

    def healed(self, row: str, layers: Sequence[int]) -> ShortHFModel:
        """A copy of the model without the layers, healed; the seconds of it are a cell."""
        if row == "original":
            return self.short
        short, file, mix = self._copy(), self._file(row, layers), self.texts["mix"]
        if file.exists():
            short.remove_layers(layers)
            short.model.load_state_dict(torch.load(file))
            return short
        # what several rows need is not counted as theirs
        teacher = self.teacher() if MIXED.get(row, row) == "distilled" else None
        budget = self.seconds_of_refit(layers) if row == "layerwise" else 0.0
        begun, how = time.process_time(), None
        short.decoder.mixed, what = row in MIXED, MIXED.get(row, row)
        if row in peer_maps.KINDS:
            maps = peer_maps.fit(short, row, layers, mix)
            short.remove_layers(layers)
            self._undo = peer_maps.apply(short, maps)  # the maps would go with it
        elif row == "replaceme":
            peer_maps.replaceme(short, layers, mix)
        elif row == "layerwise":
            how = peer_maps.layerwise(short, layers, mix, budget)
        elif what in REFITS:
            heal_refit(short, layers, self.texts[REFITS[what]])
        elif teacher is not None:
            heal_refit(short, layers, mix)
            read = self.learning
            parts = (read.training, read.validation, read.evaluation)
            options = {"recipe": self.recipe, "distillation": teacher}
            how = heal_lora(short, *parts, **options).to_dict()
        else:
            short.remove_layers(layers)
        short.decoder.mixed = False
        spent = {"processor_seconds": time.process_time() - begun, "how": how}
        self.cells.value(f"healing {row} {layers}", lambda: spent)
        if row not in ("pruned", *peer_maps.KINDS):  # which take one pass at most
            torch.save(short.model.state_dict(), part := file.with_suffix(".part"))
            part.replace(file)
        return short

    def _copy(self) -> ShortHFModel:
        return ShortHFModel(copy.deepcopy(self.short.model), tokenizer=self.short.tokenizer)

    def seconds_of_refit(self, layers: Sequence[int]) -> float:
        """Of processor time, which others do not lengthen."""

        def measure() -> dict[str, object]:
            begun = time.process_time()
            heal_refit(self._copy(), layers, self.texts["mix"])
            return {"processor_seconds": time.process_time() - begun, "how": None}

        return self.cells.value(f"healing refit {layers}", measure)["processor_seconds"]

    def teacher(self) -> Distillation:
        """What the original model predicts, asked once."""
        if self._teacher is None:
            folder = Path(f"{self.path}.teacher")
            folder.mkdir(exist_ok=True)
            windows = [*self.learning.training, *self.learning.validation]
            self._teacher, begun = Distillation(folder, self.short, windows), time.process_time()
            self._teacher.fill()
            self.cells.value("seconds of the teacher", lambda: time.process_time() - begun)
        return self._teacher

    def found(self, row: str, layers: Sequence[int]) -> tuple[Documents, dict[str, Any]]:
        """Values of documents by task and metric, and losses by text, all measured before."""
        documents: dict[str, Any] = {}
        parts = {}
        for cell in self._plan(row, layers):
            kind = cell.split(": ")[-1]
            if kind in self.kinds:
                parts[kind] = self.cells.perplexities(cell, list)
            else:
                for task, own in self.cells.value(cell, dict).items():
                    known = documents.setdefault(task, {metric: [] for metric in own})
                    for metric, values in own.items():
                        known[metric] += values
        return documents, parts

    def apart(self, first: Sequence[Case], second: Sequence[Case]) -> dict[str, Any]:
        """What the means of rows are more than those of others, paired over documents."""
        after, before = (
            summed([judging(self.found(*case)[0]) for case in own]) for own in (first, second)
        )
        without = change(unflattered(before), unflattered(after))
        return change(before, after) | {"without boolq": without}

    def summary(self, row: str, layers: Sequence[int]) -> dict[str, Any]:
        """Every task and text, the mean with the share kept, and what the refit changes of it."""
        (documents, parts), (whole, read) = self.found(row, layers), self.found("original", [])
        cell = f"healing {row} {layers}"
        refit = None
        before, after = judging(whole), judging(documents)
        if row not in ("original", "refit") and not self.missing("refit", layers):
            better, lower = self.found("refit", layers)
            healed = judging(better)
            refit = change(after, healed) | {"texts": text_changes(lower, parts)}
            # the first half of the windows also chose the refit's settings
            half = [{k: v[len(v) // 2 :] for k, v in own.items()} for own in (lower, parts)]
            refit |= {"texts, second half": text_changes(*half)}
            refit |= {"without boolq": change(unflattered(after), unflattered(healed))}
        return {
            "tasks": metrics(documents, whole),
            "mean": kept(before, after),
            "without boolq": kept(unflattered(before), unflattered(after)),
            "above guessing": kept(above_guesses(before), above_guesses(after)),
            "texts": text_changes(parts, read),
            "refit against it": refit,
            "healing": self.cells.value(cell, dict) if cell in self.cells else None,
        }

    def same_as_theirs(self) -> dict[str, object]:
        """How far `SharedContexts` gives what lm-eval's class for transformers does."""
        suite = self.suite(CHECKED)

        def compare() -> dict[str, object]:
            ours = suite.documents(SharedContexts(self.short))
            return against_theirs(ours, suite, self.short)

        return self.cells.value("hf", compare)


def documents_of(suite: TaskSuite, short: ShortHFModel) -> Documents:
    return suite.documents(SharedContexts(short)).documents


def parts(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Of a row of a task's file: its questions or contexts, and what may follow each."""
    firsts = row.get("context_options") or [row.get("query") or row["context"]]
    ends = row.get("choices") or [*filter(None, [row.get("continuation")])]
    return firsts, [f" {end}" for end in ends]


def pieces(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All halves of a short document, and pieces of another, one after the other."""
    size = min(RUN, max(LEAST, (len(ids) + 1) // 2))
    step = 1 if len(ids) < 2 * RUN else RUN
    return (tuple(ids[i : i + size]) for i in range(0, len(ids) - size + 1, step))


def holds(window: Sequence[int], asked: Pieces) -> bool:
    """Whether a window has one of the pieces."""
    ids = tuple(window)
    return any(
        ids[i : i + len(piece)] == piece
        for i in range(len(ids) - LEAST + 1)
        for piece in asked.get(ids[i : i + LEAST], ())
    )


if __name__ == "__main__":
    fire.Fire(main)

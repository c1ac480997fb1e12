"""Own samples of the real small model as calibration text, against real text.

Layers are removed and the rest is refitted on windows of one source, and judged on held-out
chapters of the book, on novels, on the second half of a third text, and on other dialogs of the
model's own. Sources are the book, the first half of the third text, and text that the model itself
writes: more and more of it, at other temperatures, and as chats; and mixes of them, also without
the layers that greedy search chose. Also: which layers Block Influence chooses on own samples and
on real text, and what they cost.

    python benchmarks/studies/own_samples.py --novels lambada_openai.jsonl \
        --wikitext wikitext2_test.txt --out own_samples.json

``--distance`` measures instead how far refits on own text, on dialogs, on half of each and on the
book leave the model from the original, and how many questions they answer right:

    python benchmarks/studies/own_samples.py --distance --layers 12,13,14,17 \
        --wikitext wikitext2_test.txt --out own_dialogs.json

``--rows own-24,book-24`` measures some rows, ``--first N`` ends after N new ones. Own samples are
written once and kept beside the file, rows in its state, from which the same command goes on; the
file holds all rows that are there. ``--choices False`` leaves the layers' choices out.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.agreement import WindowScores, agreement, score_windows
from benchmarks.lib.judging import Losses, Windows, both_held_out, by_kind, cut, halves, judge, row
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.task_files import passages
from short_gpt import ShortModel, open_model, own_samples
from short_gpt.data import demo
from short_gpt.evaluation.answers import Question, answer_windows, ask, questions
from short_gpt.evaluation.perplexity import combined, difference, window_perplexities
from short_gpt.healing import RefitSettings, refit
from short_gpt.healing.choosing import ResultCache, pruned_losses
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile

LAYERS = (3, 12, 13, 14, 15, 17, 25, 26)
SIZE = 512
GREEDY = (3, 12, 13, 14, 15, 16, 17, 18)  # greedy search's
OTHERS = " (greedy search's layers)"  # of a row
COUNT, SHORTER = 48, 384  # windows of so many tokens, for the distance
HELD = {"book": 10, "novels": 12, "wikitext": 10, "chats": 8}  # windows to judge by


class Source(NamedTuple):
    """What a refit is fitted on: so many windows of each text, and of the model's own."""

    own: int = 0
    book: int = 0
    wikitext: int = 0
    temperature: float = 1.0
    chat: bool = False
    greedy: bool = False  # whether it is greedy search's layers that are removed


SOURCES = {
    "book-24": Source(book=24),
    "wikitext-24": Source(wikitext=24),
    "book+wikitext-24": Source(book=12, wikitext=12),
    **{f"own-{count}": Source(count) for count in (12, 24, 48, 96, 192)},
    "chats-24": Source(24, chat=True),
    **{f"own-24-at-{degree}": Source(24, temperature=degree) for degree in (0.7, 1.2)},
    "a third each-24": Source(8, 8, 8),
    "book+wikitext-96": Source(book=48, wikitext=48),
    "book+wikitext+own-96": Source(48, 24, 24),
    **{f"own-{count}{OTHERS}": Source(count, greedy=True) for count in (24, 96)},
    f"book+wikitext+own-96{OTHERS}": Source(48, 24, 24, greedy=True),
}
PAIRS = (  # rows whose difference is written: of the first from the second
    ("own-24", "book+wikitext-24"),
    ("own-96", "book+wikitext-96"),
    ("a third each-24", "book+wikitext-24"),
    ("book+wikitext+own-96", "book+wikitext-96"),
    ("own-192", "own-96"),
    ("own-192", "own-12"),
    ("own-24-at-0.7", "own-24"),
    ("own-24-at-1.2", "own-24"),
    ("chats-24", "own-24"),
    *((f"{name}{OTHERS}", name) for name in ("own-24", "own-96", "book+wikitext+own-96")),
)


def main(
    novels: str = "",
    wikitext: str | None = None,
    layers: Sequence[int] = LAYERS,
    rows: str | Sequence[str] = tuple(SOURCES),
    first: int | None = None,
    choices: bool = True,
    distance: bool = False,
    seeds: Sequence[int] = (0,),
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the tables, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short, gone = open_model(str(demo.gguf_file())), sorted(layers)
    if distance:
        path = Path(out or "own_dialogs.json")
        found = distances(short, gone, str(wikitext), seeds, path, first)
        finish("own_samples", [], found, out=out, overwrite=overwrite)
    pieces = passages(Path(novels))
    documents = ["\n\n".join(pieces[i : i + 50]) for i in range(0, len(pieces), 50)]
    kinds = {"book": demo.bible("held_out"), "novels": documents[::2]}
    kinds |= {"wikitext": [halves(wikitext)[1]]} if wikitext else {}
    held = {kind: cut(short, texts, HELD[kind], SIZE) for kind, texts in kinds.items()}
    path = Path(out or "own_samples.json")
    # of another seed: no row is fitted on these
    held["chats"] = own_samples(short, HELD["chats"], SIZE, seed=1, chat=True, beside=path)
    identity = {"model": short.identity(), "judged by": json_digest(held), "layers": gone}
    identity |= {"refit": vars(RefitSettings())}
    cells = ResultCache(StateFile(f"{path}.state", identity, every=0.0))
    run = _Run(short, cells, held, path, halves(wikitext)[0] if wikitext else "")
    names = rows.split(",") if isinstance(rows, str) else rows  # fire makes a,b a tuple
    new, sets = [name for name in names if name not in cells], {False: gone, True: [*GREEDY]}
    for name in new[:first]:
        run.refitted(name, sets)
    if new[first or len(new) :]:
        sys.exit()
    original = run.losses("original", [])
    pruned = {greedy: run.losses(f"pruned{OTHERS * greedy}", own) for greedy, own in sets.items()}
    found = {"original": original, "pruned": pruned[False], f"pruned{OTHERS}": pruned[True]}
    found |= {name: run.refitted(name, sets) for name in SOURCES if name in cells}
    table = {n: row(own, original, pruned[n.endswith(OTHERS)]) for n, own in found.items()}
    print(shown(table))
    chosen = run.choices(len(gone), cut(short, documents[1::2], 24, SIZE)) if choices else None
    content = {"layers_removed": gone, "greedy_search": [*GREEDY], "tokens_per_window": SIZE}
    content |= {"differences": differences(found)}
    content |= {"windows_to_judge_by": HELD, "rows": table, "choices": chosen}
    finish("own_samples", [], content, out=out, overwrite=overwrite)


class _Run(NamedTuple):
    """What is measured, every cell once."""

    short: ShortModel
    cells: ResultCache
    held: Mapping[str, Windows]
    path: Path  # beside which own samples are kept
    first_half: str  # of the third text

    def windows(self, source: Source) -> Sequence[Sequence[int]]:
        how = {"temperature": source.temperature, "chat": source.chat, "beside": self.path}
        own = own_samples(self.short, source.own, SIZE, **how) if source.own else []
        book = cut(self.short, demo.bible(), source.book, SIZE)
        wikitext = cut(self.short, [self.first_half], source.wikitext, SIZE)
        texts = [text for text in (book, wikitext, own) if text]
        if len({*map(len, texts)}) > 1:
            mixed = [window for text in texts for window in text]
            random.Random(0).shuffle(mixed)  # every eighth is held out of the fit: of all texts
            return mixed
        mixed = [window for turn in zip(*texts, strict=True) for window in turn]
        return both_held_out(mixed) if len(texts) == 2 else mixed

    def losses(self, cell: str, gone: Sequence[int], fit_on: Any = None) -> Losses:
        """Losses on all held-out windows by their kind, without layers and maybe refitted."""

        def measure() -> Losses:
            if not gone:
                return judge(self.short, self.held)
            every = [window for windows in self.held.values() for window in windows]
            taken = iter(pruned_losses(self.short, list(gone), every, fit_on=fit_on))
            return {kind: [next(taken) for _ in windows] for kind, windows in self.held.items()}

        return by_kind(self.cells, cell, self.held, measure)

    def refitted(self, name: str, sets: Mapping[bool, Sequence[int]]) -> Losses:
        source = SOURCES[name]
        fit_on = None if name in self.cells else self.windows(source)
        return self.losses(name, sets[source.greedy], fit_on)

    def choices(self, n: int, novels: Windows) -> dict[str, Any]:
        """The layers of lowest Block Influence on own samples and on real text, and their cost."""
        texts = {
            "book": partial(self.windows, SOURCES["book-24"]),
            "own-24": partial(self.windows, SOURCES["own-24"]),
            "novels": lambda: novels,
        }
        scores = {}
        for name, read in texts.items():

            def measure(read: Any = read) -> dict[str, Any]:
                return score_windows(self.short, read(), n)._asdict()

            scores[name] = WindowScores(**self.cells.value(f"scores {name}", measure))
        sets = {name: own.chosen for name, own in scores.items()}
        original = self.losses("original", [])
        costs = {}
        for name, gone in sets.items():
            losses = self.losses(f"pruned {gone}", gone)
            costs[name] = {"layers": gone, **row(losses, original, losses)}
            print(f"{name:<8} removes {gone}: " + perplexities(costs[name]))
        pairs = combinations(scores, 2)
        agreed = [agreement((a, b), scores[a], scores[b])._asdict() for a, b in pairs]
        own, other = (
            self.losses(f"pruned {sets[name]}", sets[name]) for name in ("own-24", "novels")
        )
        return {"sets": costs, "novels less own-24": apart(own, other), "agreement": agreed}


def distances(
    short: ShortModel,
    layers: Sequence[int],
    wikitext: str,
    seeds: Sequence[int],
    path: Path,
    first: int | None,
) -> dict[str, Any]:
    """By text and seed of a refit: KL divergence, same top token, and right answers.

    Windows are read with matrix products in bfloat16, own text is written in float32.
    """
    replies = ask(short, questions(), progress=False)
    kinds = {"wikitext": cut(short, [Path(wikitext).read_text("utf-8")], 14, SIZE)}
    kinds |= {
        "book": cut(short, demo.bible("held_out"), 4, SIZE),
        "answers": answer_windows(replies),
    }
    short = short.in_precision("mixed")
    reference = short.reference([window for windows in kinds.values() for window in windows])
    identity = {"model": short.identity(), "judged by": json_digest(kinds)}
    cells = ResultCache(StateFile(f"{path}.state", identity, every=0.0))

    def texts(kind: str, seed: int) -> list[list[int]]:
        if kind == "book":
            return cut(short, demo.bible(), COUNT, SHORTER)
        how = {"seed": seed, "beside": path}
        own = {c: own_samples(short, COUNT, SHORTER, chat=c, **how) for c in (False, True)}
        if kind == "half of each":  # as `own_samples` has it by default
            return [own[(i + i // 8) % 2 == 1][i] for i in range(COUNT)]
        return [*own[kind == "dialogs"]]

    def measure(kind: str, seed: int) -> dict[str, Any]:
        with ExitStack() as stack:
            if kind == "none":
                stack.enter_context(short.without_layers(layers))
            else:
                fitted = refit.fit(short, layers, texts(kind, seed), progress=False)
                stack.enter_context(short.without_layers(layers))
                stack.callback(refit.apply_refit(short, fitted))
            found: dict[str, Any] = {}
            for name, windows in kinds.items():
                each = window_perplexities(short.decoder, windows, reference=reference)
                found[name] = combined(each).to_dict()
            asked = [*questions(), Question("What is a king?")]
            *answers, king = ask(short, asked, progress=False)
        both = [now.right and was.right for now, was in zip(answers, replies, strict=True)]
        right = {"right": sum(bool(now.right) for now in answers), "kept": sum(map(bool, both))}
        return {**found, **right, "what a king is": king.text}

    rows, new = {}, 0
    for seed, kind in product(seeds, ("none", "book", "text", "half of each", "dialogs")):
        cell = f"{len(layers)} layers, {kind}, seed {seed}"
        new += cell not in cells
        if new > (first or new):
            sys.exit()
        rows[cell] = cells.value(cell, partial(measure, kind, seed))
        print(cell, json.dumps(rows[cell]), flush=True)
    about = {"layers_removed": [*layers], "windows": COUNT, "tokens_per_window": SHORTER}
    about |= {"original_right": sum(bool(reply.right) for reply in replies)}
    return {**about, "rows": rows}


def apart(first: Losses, second: Losses) -> dict[str, dict[str, float]]:
    """By kind, the nats per token that the second loses more, and their paired standard error."""
    found = {kind: difference(own, second[kind]) for kind, own in first.items()}
    return {k: {"nats": d.nats, "standard_error": d.standard_error} for k, d in found.items()}


def differences(found: Mapping[str, Losses]) -> dict[str, dict[str, dict[str, float]]]:
    """The pairs that are measured, as `apart`."""
    pairs = [(one, other) for one, other in PAIRS if one in found and other in found]
    return {f"{one} less {other}": apart(found[other], found[one]) for one, other in pairs}


def perplexities(cells: Mapping[str, Any]) -> str:
    own = {kind: cell for kind, cell in cells.items() if kind in HELD}
    return ", ".join(f"{kind} {cell['perplexity']:.2f}" for kind, cell in own.items())


def shown(table: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(f"{name:<24}{perplexities(cells)}" for name, cells in table.items())


if __name__ == "__main__":
    fire.Fire(main)

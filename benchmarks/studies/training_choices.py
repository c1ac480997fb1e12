"""What short training after the refit brings by way of training, at equal processor time.

The automatic choice's 8 layers are removed from the real small model. The rest is refitted on
windows of the book, of WikiText-2's first half and of the model's own samples. From there each way
learns what the original model predicts, on other windows, for so many seconds of processor time:
the original model's pass over every new window counts, judging does not. Judged on held-out
chapters, on WikiText-2's second half, and on novels, which nothing read.

    python benchmarks/studies/training_choices.py --novels lambada_openai.jsonl \
        --wikitext wikitext2_test.txt --out training_choices.json

``--rows lora,full-1e-4`` measures some ways, ``--first N`` ends after N new ones. The refit is kept
beside the file, with the own samples and the rows, from which the same command goes on.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch
from torch import nn

from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.passages import passages
from benchmarks.studies.calibration import joined
from benchmarks.studies.healing import Windows, cut, halves, judge
from benchmarks.studies.refits import Losses, by_kind
from short_gpt import ShortHFModel, heal_refit, open_model, own_samples
from short_gpt.data import demo, without_overlap
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import combined, difference
from short_gpt.healing import Recipe, RefitSettings
from short_gpt.healing.distillation import Targets, divergence
from short_gpt.healing.lora import adapt
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile

LAYERS = (10, 12, 13, 14, 15, 16, 17, 18)  # the automatic choice's 8, see `choices.py`
SIZE, FITTED, OWN = 512, (24, 24, 48), 96  # tokens, windows of the refit, own samples
HELD = {"book": 8, "wikitext": 6, "novels": 8}  # windows of 512 tokens to judge by


class Way(NamedTuple):
    """One way of training."""

    rank: int = 32  # of low-rank changes; 0 trains all parameters of the kept layers
    rate: float = 1e-3  # at its peak
    modules: Sequence[str] | None = None  # None: the MLP's
    fresh: bool = True  # whether the windows are others than the refit's
    start: int = 0  # the first layer that learns


GAP = 9  # the last layer before the first removed one, as the pruned model counts
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = {
    "lora": Way(),
    "full-1e-4": Way(rank=0, rate=1e-4),
    "lora-refit-windows": Way(fresh=False),
    "lora-3e-3": Way(rate=3e-3),
    "lora-all-maps": Way(modules=ALL),
    "lora-from-gap": Way(start=GAP),
    "lora-all-maps-from-gap": Way(start=GAP, modules=ALL),
}


def main(
    novels: str,
    wikitext: str,
    seconds: float = 180.0,
    rows: str | Sequence[str] = tuple(WAYS),
    first: int | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    path = Path(out or "training_choices.json")
    short = ShortHFModel.from_meta(str(demo.checkpoint()), device="cpu", dtype="float32")
    texts = {"book": demo.bible("held_out"), "wikitext": [halves(wikitext)[1]]}
    texts["novels"] = joined(passages(Path(novels)), 50)
    held = {kind: cut(short, texts[kind], count, SIZE) for kind, count in HELD.items()}
    identity = {"model": short.identity(), "layers": list(LAYERS), "seconds": seconds}
    identity |= {"judged by": json_digest(held), "refit": vars(RefitSettings())}
    cells = Cells(StateFile(f"{path}.state", identity, every=0.0))
    run = _Run(short, cells, held, path, wikitext, seconds)
    names = rows.split(",") if isinstance(rows, str) else rows  # fire makes a,b a tuple
    new = [name for name in names if name not in cells]
    run.refitted()
    for name in new[:first]:
        run.trained(name, WAYS[name])
    if new[first or len(new) :]:
        sys.exit()
    done = [name for name in ("refit", *WAYS) if name in cells]
    table = {name: run.row(name) for name in done}
    print(shown(table))
    content = {"layers": list(LAYERS), "windows_refitted_on": FITTED, "seconds": seconds}
    content |= {"windows_to_judge_by": HELD, "rows": table}
    finish("training_choices", [], content, out=out, overwrite=overwrite)


class _Run(NamedTuple):
    """What is measured, every cell once."""

    short: ShortHFModel
    cells: Cells
    held: dict[str, Windows]
    path: Path
    wikitext: str
    seconds: float

    def losses(self, cell: str, measure: Any) -> Losses:
        return by_kind(self.cells, cell, self.held, measure)

    def row(self, name: str) -> dict[str, Any]:
        """Perplexity by kind, and the nats since the refit, and from today's way."""
        found = self.losses(name, None)
        cells: dict[str, Any] = {}
        for kind, own in found.items():
            cells[kind] = {"perplexity": combined(own).value}
            for other in ("refit", "lora"):
                if other in self.cells:
                    change = difference(self.losses(other, None)[kind], own)
                    cells[kind][f"from {other}"] = {
                        "nats": change.nats,
                        "standard_error": change.standard_error,
                    }
        steps = f"steps {name}"
        return cells | (self.cells.value(steps, None) if steps in self.cells else {})

    def windows(self) -> dict[str, Windows]:
        """Of each kind, those of the refit first; none shares text with those to judge by."""
        judged = [w for own in self.held.values() for w in own]
        texts = {"book": demo.bible("calibration"), "wikitext": [halves(self.wikitext)[0]]}
        kinds = {kind: cut(self.short, read, 240, SIZE) for kind, read in texts.items()}
        writer = open_model(str(demo.gguf_file()))
        kinds["own"] = own_samples(writer, OWN, SIZE, beside=self.path)
        return {kind: without_overlap(read, judged)[0] for kind, read in kinds.items()}

    def refitted(self) -> None:
        """Removes the layers and refits; what was kept of an earlier run is read."""
        every = self.windows().values()
        mixed = [w for count, own in zip(FITTED, every, strict=True) for w in own[:count]]
        order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))
        learned = [list(mixed[i]) for i in order.tolist()]
        read = json_digest([LAYERS, learned, vars(RefitSettings())])
        kept = Path(f"{self.path}.refit-{read}.pt")
        if not kept.exists():
            begun = time.process_time()
            heal_refit(self.short, LAYERS, learned)
            print(f"refit: {time.process_time() - begun:.0f} s of processor time")
            torch.save(self.short.trainable().state_dict(), kept)
        else:
            self.short.remove_layers(LAYERS)
            self.short.trainable().load_state_dict(torch.load(kept, mmap=True))
        self.losses("refit", lambda: judge(self.short, self.held))

    def original(self) -> ShortHFModel:
        return ShortHFModel.from_meta(str(demo.checkpoint()), device="cpu", dtype="float32")

    def stream(self, way: Way) -> Iterator[tuple[int, ...]]:
        """Windows in the order in which a way reads them, the kinds by turns, again and again."""
        every = zip(self.windows().values(), FITTED, strict=True)
        kinds = [own[count:] if way.fresh else own[:count] for own, count in every]
        return cycle([tuple(w) for group in zip(*kinds, strict=False) for w in group])

    def trained(self, name: str, way: Way) -> Losses:
        """Trains from the refit, judges, and goes back to the refit."""
        model = self.short.trainable()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        kept = Path(f"{self.path}.teacher.pt")
        teacher = _Teacher(
            self.original().trainable().eval(), torch.load(kept) if kept.exists() else {}
        )
        steps = _train(model, teacher, self.stream(way), way, self.seconds)
        torch.save(teacher.known, kept)
        model.eval()
        measured = self.losses(name, lambda: judge(self.short, self.held))
        self.cells.value(f"steps {name}", lambda: steps)
        model.load_state_dict(before)
        print(f"{name}: {steps}", *(f"{k} {combined(v).value:.2f}" for k, v in measured.items()))
        sys.stdout.flush()
        return measured


class _Teacher:
    """The original model's predictions, each with the processor time that it took."""

    def __init__(self, model: nn.Module, known: dict[tuple[int, ...], tuple[Any, float]]) -> None:
        self.model, self.known = model, known

    def targets(self, window: tuple[int, ...]) -> tuple[Targets, float]:
        """What it predicts, and what that took, whenever it was."""
        if window not in self.known:
            started = time.process_time()
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([window]), use_cache=False).logits[
                    0, :-1
                ]
                parts = tuple(part.clone() for part in Targets.of(logits, 64))
            self.known[window] = (parts, time.process_time() - started)
        parts, cost = self.known[window]
        return Targets(*parts), cost


def _train(
    model: Any, teacher: _Teacher, stream: Iterator[tuple[int, ...]], way: Way, seconds: float
) -> dict[str, Any]:
    """Steps of Adam until the time is over, by which a half cosine of the rate goes to 0."""
    model.requires_grad_(False)
    if way.rank:
        modules = None if way.modules is None else tuple(way.modules)
        recipe = Recipe(rank=way.rank, alpha=2 * way.rank, dropout=0.0, modules=modules)
        trained: Any = adapt(model, recipe)
    else:
        trained = model
        model.model.layers.requires_grad_(True)
    for layer in model.model.layers[: way.start]:
        layer.requires_grad_(False)
    weights = [p for p in trained.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(weights, lr=way.rate, weight_decay=0.0)
    trained.train()
    read: set[tuple[int, ...]] = set()
    spent, asked, steps, tokens = 0.0, 0.0, 0, 0
    while (done := (spent + asked) / seconds) < 1:
        for group in adam.param_groups:
            group["lr"] = way.rate * min(1, (steps + 1) / 4) * (1 + math.cos(math.pi * done)) / 2
        window = next(stream)
        targets, cost = teacher.targets(window)
        asked += 0 if window in read else cost
        read.add(window)
        started = time.process_time()
        ids = torch.tensor([window])
        logits = trained(input_ids=ids, use_cache=False).logits[0, :-1]  # (N, V)
        divergence(logits, targets).mean().backward()
        tokens += len(window)
        nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()
        steps += 1
        spent += time.process_time() - started
    if way.rank:
        trained.merge_and_unload()
        vars(model).pop("peft_config", None)
    return {"steps": steps, "tokens": tokens, "seconds": spent, "of the original model": asked}


def shown(table: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, cells in table.items():
        parts = [f"{kind} {cells[kind]['perplexity']:.2f}" for kind in HELD]
        for kind in HELD:
            if change := cells[kind].get("from lora"):
                parts.append(f"{change['nats']:+.4f} ({change['standard_error']:.4f})")
        lines.append(f"{name:<24}" + "  ".join(parts))
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)

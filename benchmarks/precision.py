"""The closed road in float32 and with products in bfloat16: its time, and what it loses.

Block Influence chooses 8 of 30 layers of the real small model on windows of the book and of another
text, the rest is refitted on them, and the original, the pruned and the refitted model are judged
on three kinds of text; the layers of greedy search are refitted and judged, too. All of it is run
in float32 and with ``--precision mixed``, in turn, so that both meet the same machine. What mixed
precision refitted is judged in float32 as well, and compared over the windows with what float32
refitted.

    python benchmarks/precision.py --also FILE --others FILE --out precision.json

``--also`` and ``--others`` are as in ``healing.py``. The processor must multiply bfloat16; one that
does so slowly shows what mixed precision loses, and not what it gains.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fire
import torch
from healing import Windows, fitted_on, judge, judged_by
from outcome import begin, finish
from scoring import build, in_mixed

from short_gpt import ShortLlama
from short_gpt.evaluation.paired import difference, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import refit
from short_gpt.runtime.progress import duration
from short_gpt.scoring.run import measure
from short_gpt.selection.methods import choose
from short_gpt.wrappers.precision import bfloat16_cost

GREEDY = [3, 12, 13, 14, 15, 16, 17, 18]
PRECISIONS = ("float32", "mixed")
GOAL = 0.65  # of the time in float32
Judged = Mapping[str, Sequence[Perplexity]]
Value = TypeVar("Value")


def main(
    also: str,
    others: str | None = None,
    n: int = 8,
    count: int = 24,
    size: int = 1024,
    judged: int = 8,
    repeats: int = 3,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        also, others: as in ``healing.py``.
        n: layers to remove.
        count: windows that score and refit, half of each text.
        size: their tokens, and those of the windows that judge.
        judged: windows of each kind to judge by.
        repeats: how often all is timed in either precision.
        out, overwrite: the JSON file.
    """
    begin(out, overwrite=overwrite)
    short = build()
    learned = fitted_on(short, count // 2, count // 2, also, size)
    kinds = judged_by(short, also, others, judged, size)
    roads: dict[str, list[Road]] = {name: [] for name in PRECISIONS}
    for repeat in range(repeats):
        for name in PRECISIONS if repeat % 2 == 0 else PRECISIONS[::-1]:
            roads[name].append(Road(short, learned, kinds, n, mixed=name == "mixed"))
            print(f"{name}: {duration(sum(roads[name][-1].seconds.values()))}", flush=True)
    plain, mixed = (roads[name][0] for name in PRECISIONS)
    content: dict[str, Any] = {
        "n": n,
        "windows": count,
        "tokens_per_window": size,
        "judged": judged,
        "a product in bfloat16 / in float32": bfloat16_cost(torch.device("cpu")),
        "steps": steps(roads),
        "sets": {name: compared(plain, mixed, name) for name in plain.sets},
        "seconds": {name: [road.seconds for road in own] for name, own in roads.items()},
    }
    print(table(content))
    ratio = content["steps"]["all"]["ratio"]["median"]
    missed = [f"mixed takes {ratio:.2f} of the time, at most {GOAL}"] if ratio > GOAL else []
    finish("precision", missed, content, out=out, overwrite=overwrite)


class Road:
    """The road in one precision: seconds by step, and by set of layers what it led to."""

    def __init__(
        self,
        short: ShortLlama,
        learned: Windows,
        kinds: Mapping[str, Windows],
        n: int,
        *,
        mixed: bool,
    ) -> None:
        self._short, self._kinds, self._mixed = short, kinds, mixed
        self.seconds: dict[str, float] = defaultdict(float)
        scores = self._timed("score", lambda: measure(short.decoder, [[w] for w in learned]))
        chosen = sorted(choose(scores, n, method="bi"))
        self.sets = {"Block Influence": chosen, "greedy search": GREEDY}
        self.losses = {"original": self._timed("judge", self._judge)}
        self.in_float32: dict[str, Judged] = {}  # of models that this precision refitted
        for name, layers in self.sets.items():
            fitted = self._timed("refit", lambda layers=layers: self._fit(layers, learned))
            with short.without_layers(layers):
                self.losses[f"{name}, pruned"] = self._timed("judge", self._judge)
                undo = refit.fold(short, fitted)
                self.losses[f"{name}, refit"] = self._timed("judge", self._judge)
                self.in_float32[name] = self._judge() if mixed else self.losses[f"{name}, refit"]
                undo()

    def _timed(self, step: str, run: Callable[[], Value]) -> Value:
        started = time.perf_counter()
        value = in_mixed(self._short, run) if self._mixed else run()
        self.seconds[step] += time.perf_counter() - started
        return value

    def _judge(self) -> Judged:
        return judge(self._short, self._kinds)

    def _fit(self, layers: list[int], learned: Windows) -> refit.Refit:
        return refit.fit(self._short, layers, learned, progress=False)


def steps(roads: Mapping[str, Sequence[Road]]) -> dict[str, Any]:
    """Seconds of every step in either precision, and their ratio: median and range over repeats."""
    names = [*roads["float32"][0].seconds, "all"]
    result: dict[str, Any] = {}
    for step in names:
        seconds = {
            name: [sum(r.seconds.values()) if step == "all" else r.seconds[step] for r in own]
            for name, own in roads.items()
        }
        ratios = [m / p for p, m in zip(seconds["float32"], seconds["mixed"], strict=True)]
        spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result[step] = {name: statistics.median(own) for name, own in seconds.items()}
        result[step]["ratio"] = spread
    return result


def compared(plain: Road, mixed: Road, name: str) -> dict[str, Any]:
    """What both precisions found of a set; differences are mixed minus float32, paired."""
    result: dict[str, Any] = {"layers": {"float32": plain.sets[name], "mixed": mixed.sets[name]}}
    for state in ("original", f"{name}, pruned", f"{name}, refit"):
        short_name = state.removeprefix(f"{name}, ")
        result[short_name] = differences(plain.losses[state], mixed.losses[state])
    result["refit, judged in float32"] = differences(plain.in_float32[name], mixed.in_float32[name])
    return result


def differences(plain: Judged, mixed: Judged) -> dict[str, Any]:
    result = {}
    for kind in plain:
        change = difference(plain[kind], mixed[kind])
        result[kind] = {
            "float32": together(plain[kind]).value,
            "mixed": together(mixed[kind]).value,
            "nats": change.nats,
            "standard_error": change.standard_error,
        }
    return result


def table(content: Mapping[str, Any]) -> str:
    lines = [f"{'seconds':<16}{'float32':>10}{'mixed':>10}   ratio (range)"]
    for name, row in content["steps"].items():
        ratio = row["ratio"]
        shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
        lines.append(f"{name:<16}{row['float32']:>10.1f}{row['mixed']:>10.1f}   {shown}")
    for name, states in content["sets"].items():
        lines.append(f"{name}: {states['layers']}")
        for state, kinds in states.items():
            for kind, row in kinds.items() if state != "layers" else ():
                nats = f"{row['nats']:+.5f} ({row['standard_error']:.5f})"
                lines.append(
                    f"  {state:<26}{kind:<30}{row['float32']:>9.3f}{row['mixed']:>9.3f} {nats}"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)

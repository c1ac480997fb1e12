"""Shrinking in float32 and with products in bfloat16: the time of all of it, and the quality.

Each run chooses layers, removes them, refits and judges, as ``shrink`` does. What the runs wrote is
then judged in float32 on the same windows, paired. Of each two runs, another precision is the
first. Block Influence chooses the layers, and so both precisions do the same work: how many windows
``auto`` reads depends on the losses.

    python benchmarks/studies/mixed.py --also wikitext2_test.txt --others lambada_passages.txt \
        --out benchmarks/results/mixed.json

``--also`` and ``--others`` are as in ``healing.py``. A processor with products in bfloat16 is
needed, such as one with AVX512_BF16, and nothing else that runs meanwhile.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch

from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.studies.healing import halves, judged_by
from short_gpt import open_model, shrink
from short_gpt.data import demo
from short_gpt.evaluation.perplexity import combined, difference, window_perplexities

PRECISIONS = ("float32", "mixed")
GOAL = 0.65  # of the time in float32


def main(
    also: str,
    others: str,
    n: int = 8,
    count: int = 48,
    size: int = 512,
    judged: int = 16,
    repeats: int = 2,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        also, others: as in ``healing.py``; the first half of ``also`` is learned from.
        n: layers to remove.
        count: windows that choose and heal, half of the book and half of ``also``.
        size: tokens of a window.
        judged: windows to judge by, in each run and of each kind of text afterwards.
        repeats: runs in each precision.
    """
    begin(out, overwrite=overwrite)
    path = str(MODELS["smollm2"]())
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    layers: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        book = "\n".join(demo.bible("calibration"))
        for file, text in (("book", book), ("also", halves(also)[0])):
            (here / f"{file}.txt").write_text(text, encoding="utf-8")
        (here / "held_out.txt").write_text("\n".join(demo.bible("held_out")), encoding="utf-8")
        held_out = str(here / "held_out.txt")
        reading = {"eval_data": held_out, "size": size, "max_windows": count}
        data = ",".join(str(here / f"{file}.txt") for file in ("book", "also"))
        for turn in range(2 * repeats):
            precision = PRECISIONS[(turn + turn // 2) % 2]
            how: dict[str, Any] = {"n": n, "method": "bi", "data": data, **reading}
            how |= {"eval_windows": judged, "device": "cpu", "precision": precision}
            started = time.perf_counter()
            shrunk = shrink(path, here / precision, **how, overwrite=True)
            seconds[precision].append(time.perf_counter() - started)
            layers[precision] = sorted(shrunk.layers)
            print(f"{precision}: {seconds[precision][-1]:.0f} s", flush=True)
        shorts = {"original": open_model(path, device="cpu")}
        shorts |= {p: open_model(str(here / p), device="cpu") for p in PRECISIONS}
    kinds = judged_by(shorts["original"], also, others, judged, size)
    parts = {
        name: {kind: window_perplexities(short.decoder, read) for kind, read in kinds.items()}
        for name, short in shorts.items()
    }
    rows = {}
    for kind in kinds:
        rows[kind] = {name: combined(own[kind]).value for name, own in parts.items()}
        change = difference(*(parts[p][kind] for p in PRECISIONS))
        rows[kind] |= {"change": change.nats, "standard_error": change.standard_error}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(table(rows, ratios))
    content: dict[str, Any] = {"layers": layers, "windows": count, "tokens_per_window": size}
    content |= {"judged": judged, "seconds": seconds, "ratios": ratios, "rows": rows}
    content |= {"processor": torch.backends.cpu.get_cpu_capability()}
    ratio = statistics.median(ratios)
    missed = [f"mixed takes {ratio:.2f} of the time, at most {GOAL}"] * (ratio > GOAL)
    finish("mixed", missed, content, out=out, overwrite=overwrite)


def table(rows: dict[str, dict[str, float]], ratios: list[float]) -> str:
    """A line for every kind of text: perplexities, and nats that mixed adds."""
    lines = [f"mixed takes {', '.join(f'{r:.2f}' for r in ratios)} of the time in float32"]
    for kind, own in rows.items():
        values = " ".join(f"{name} {own[name]:.3f}" for name in ("original", *PRECISIONS))
        lines.append(f"{kind:<32}{values}  {own['change']:+.4f} ({own['standard_error']:.4f})")
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)

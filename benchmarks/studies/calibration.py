"""Which text chooses the layers, on the real small model: five kinds of text.

Every text ranks, and its choice is judged on all of them; windows of other lengths, and with bos in
front of every one, rank too.

    python benchmarks/studies/calibration.py --wikitext wikitext2_test.txt --tasks tasks/ --out FILE

``--tasks`` is a folder with lambada_openai.jsonl, arc_easy.jsonl and piqa.jsonl; code is the Python
that runs this. It continues from ``--state``.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import numpy as np

from benchmarks.lib.agreement import (
    WindowScores,
    agreement,
    calibrate,
    calibrated,
    correlations,
    windows_apart,
)
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.task_files import passages
from benchmarks.studies.scoring import build
from short_gpt.data import demo

CODE = 60  # files of the standard library


def main(
    wikitext: str,
    tasks: str,
    n: int = 4,
    size: int = 512,
    others: Sequence[int] = (1024, 128),
    count: int = 12,
    judged: int = 8,
    state: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the tables, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short, found = build(), documents(wikitext, tasks)
    # with bos before a text, where the tokenizer puts none
    encode = partial(short.llama.tokenizer.encode, bos=True, eos=False)
    how: dict[str, Any] = {"size": size, "others": others, "count": count, "judged": judged}
    texts, ways = windows_apart(encode, found, **how)
    result = calibrate(short, texts, n, ways=ways, state=state)
    print(calibrated(result))
    content = {
        "windows_to_rank_on": count,
        "windows_to_judge_by": judged,
        "tokens_per_window": size,
    }
    content |= {"calibration": result.to_dict(), "coverage": coverage()}
    if result.state is not None and out is not None:
        result.state.clear()
    finish("calibration", [], content, out=out, overwrite=overwrite)


def documents(wikitext: str, tasks: str) -> dict[str, list[str]]:
    """Documents of every kind of text."""
    whole, folder = Path(wikitext).read_text(encoding="utf-8"), Path(tasks)
    articles = re.split(r"(?m)^(?= ?= [^=\n]+ = ?$)", whole)
    asked = [
        f"{d['query'].strip()}\nAnswer: {d['choices'][d['gold']]}"
        for pair in zip(rows(folder / "arc_easy.jsonl"), rows(folder / "piqa.jsonl"), strict=False)
        for d in pair
    ]
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))[:CODE]
    code = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return {
        "bible": demo.bible("calibration"),
        "wikitext": articles,
        "novels": joined(passages(folder / "lambada_openai.jsonl"), 50),
        "questions": joined(asked, 50),
        "code": code,
    }


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def joined(pieces: Sequence[str], count: int) -> list[str]:
    """Documents of so many pieces."""
    return ["\n\n".join(pieces[i : i + count]) for i in range(0, len(pieces), count)]


def coverage(runs: int = 100) -> dict[str, float]:
    """How often the interval of a rank correlation holds it, for simulated texts.

    24 scores differ as those of layers do; of a window each is off by so much noise, log-normal
    or with heavy tails, and all of them together by a common factor.
    """
    draw, found = np.random.default_rng(0), {}
    for count, apart, heavy in product((6, 12, 24), (0.0, 0.3, 1.0), (False, True)):
        held = [_held(draw, count, apart, heavy=heavy) for _ in range(runs)]
        kind = "heavy" if heavy else "log-normal"
        found[f"{count} windows, {apart} apart, {kind}"] = sum(held) / runs
    return found


def _held(draw: np.random.Generator, count: int, apart: float, *, heavy: bool) -> bool:
    first = np.exp(draw.normal(-3, 0.6, 24))
    second = first * np.exp(draw.normal(0, apart, 24))
    truth = correlations(first[None], second[None])[0]
    low, high = agreement(
        ("a", "b"), *(_drawn(draw, s, count, heavy) for s in (first, second))
    ).interval
    return low <= truth <= high


def _drawn(draw: np.random.Generator, scores: np.ndarray, count: int, heavy: bool) -> WindowScores:
    shape = (count, len(scores))
    noise = draw.gamma(0.5, 2, shape) if heavy else np.exp(draw.normal(-0.5, 1, shape))  # mean 1
    common = np.exp(0.3 * draw.normal(size=(count, 1)))
    sums = (scores * (1 + 0.3 * (noise - 1)) * common).tolist()
    return WindowScores([*range(24)], "bi", 4, sums, [1.0] * count, [None] * count)


if __name__ == "__main__":
    fire.Fire(main)

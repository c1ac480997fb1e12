"""Which text chooses the layers, on the real small model: five kinds of text, and a rule checked.

Every text ranks, and its choice is judged on all of them; windows of other lengths, and with bos in
front of every one, rank too. The rule of `experiments.calibration.trust` is fixed on every three
kinds of text and checked on the other two, for several numbers of layers.

    python benchmarks/calibration.py --wikitext wikitext2_test.txt --tasks tasks/ --out FILE

``--tasks`` is a folder with lambada_openai.jsonl, arc_easy.jsonl and piqa.jsonl; code is the Python
that runs this. It continues from the files beside ``--state``.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import fire
import numpy as np
from outcome import begin, finish
from scoring import build

from short_gpt import ShortLlama, calibrate, report
from short_gpt.data import demo
from short_gpt.experiments.calibration import (
    SHARE,
    Calibrated,
    Crossed,
    WindowScores,
    agreement,
)
from short_gpt.experiments.calibration.rankings import correlations
from short_gpt.jobs import Readings
from short_gpt.jobs.calibration import windows_apart

OUTCOMES = ("trusted, harmless", "trusted, harmful", "not, harmless", "not, harmful")
CODE = 60  # files of the standard library
HARM = 0.25  # of what a text's own choice costs: dearer than that is what the rule is to foresee
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


def main(
    wikitext: str,
    tasks: str,
    n: int = 4,
    size: int = 512,
    others: Sequence[int] = (1024, 128),
    count: int = 12,
    judged: int = 8,
    counts: Sequence[int] = (2, 4),
    methods: str = "bi",
    state: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the tables, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short, found = build(), documents(wikitext, tasks)
    readings = Readings((size, *others), "first,every", count, judged)
    texts, ways = windows_apart(WithBos(short), found, readings)
    ways = {way: own for way, own in ways.items() if "first" in way or f"{size} tokens" in way}
    result = calibrate(short, texts, n, ways=ways, state=state)
    print(report.calibrated(result))
    cases = [
        calibrate(short, texts, k, method=method, healings=["raw"], state=state)
        for method, k in product(methods.split(","), counts)
    ]
    rule = checked(cases)
    print(json.dumps(rule, indent=1))
    content = {
        "windows_to_rank_on": count,
        "windows_to_judge_by": judged,
        "tokens_per_window": size,
    }
    content |= {"calibration": result.to_dict(), "rule": rule}
    content |= {"coverage": coverage()}
    content["cases"] = [case.to_dict() for case in cases]
    if result.state is not None and out is not None:
        result.state.clear()
    finish("calibration", missed(rule), content, out=out, overwrite=overwrite)


class WithBos:
    """The model's encoding with bos in front of a text, where the tokenizer puts none."""

    bos = "first"

    def __init__(self, short: ShortLlama) -> None:
        self._short = short

    def encode(self, text: str) -> list[int]:
        return self._short.llama.tokenizer.encode(text, bos=True, eos=False)


def documents(wikitext: str, tasks: str) -> dict[str, list[str]]:
    """Documents of every kind of text."""
    whole, folder = Path(wikitext).read_text(encoding="utf-8"), Path(tasks)
    articles = re.split(r"(?m)^(?= ?= [^=\n]+ = ?$)", whole)
    passages = [
        f"{d['context']} {d['continuation']}" for d in rows(folder / "lambada_openai.jsonl")
    ]
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
        "novels": joined(passages, 50),
        "questions": joined(asked, 50),
        "code": code,
    }


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def joined(pieces: Sequence[str], count: int) -> list[str]:
    """Documents of so many pieces."""
    return ["\n\n".join(pieces[i : i + count]) for i in range(0, len(pieces), count)]


def checked(cases: Sequence[Calibrated]) -> dict[str, object]:
    """How the rule does on texts that it was not fixed on, for every three of the texts.

    A case is a choice by one of three texts; by what it costs on those of them that are measured
    the rule says whether it may be trusted on one that is not, and there it is seen whether it does
    harm. Unmeasured is each of the three in turn, by which the share is fixed, and then each other
    text, by which it is checked.
    """
    texts = list(dict.fromkeys(cell.text for cell in cases[0].cells))
    splits, fitted, library = [], [], []
    for fixed in combinations(texts, 3):
        fixing = [pair for unseen in fixed for pair in pairs(cases, fixed, unseen)]
        others = [text for text in texts if text not in fixed]
        checking = [pair for unseen in others for pair in pairs(cases, fixed, unseen)]
        limit = largest(fixing)
        splits.append({"fixed_on": fixed, "share": limit, "checked": counted(checking, limit)})
        fitted.append(splits[-1]["checked"])
        library.append(counted(checking, SHARE))
    return {
        "harm": HARM,
        "share": SHARE,
        "splits": splits,
        "fitted": {name: sum(c[name] for c in fitted) for name in OUTCOMES},
        "library": {name: sum(c[name] for c in library) for name in OUTCOMES},
    }


def pairs(
    cases: Sequence[Calibrated], fixed: Sequence[str], unseen: str
) -> list[tuple[float, float]]:
    """Of every choice: its worst upper end on measured texts, and its cost on the unseen one."""
    found = []
    for case in cases:
        cells = {(c.choice, c.text): c for c in case.cells}
        for choice in fixed:
            if choice != unseen:
                measured = [t for t in fixed if t not in (choice, unseen)]
                upper = max(share(cells, choice, t, "excess_most") for t in measured)
                found.append((upper, share(cells, choice, unseen, "excess")))
    return found


def largest(fixing: Sequence[tuple[float, float]]) -> float:
    """The largest share up to which no choice that is trusted does harm; 0 if there is none."""
    safe = [s for s in SHARES if not any(u <= s and harm > HARM for u, harm in fixing)]
    return max((s for s in safe if all(t in safe for t in SHARES if t < s)), default=0.0)


def share(cells: Mapping[tuple[str, str], Crossed], choice: str, text: str, name: str) -> float:
    """What a choice costs on a text beyond the text's own, in parts of that one's cost."""
    return max(0.0, getattr(cells[choice, text], name)) / cells[text, text].nats


def counted(found: Sequence[tuple[float, float]], limit: float) -> dict[str, int]:
    """How often the rule trusted, and how often the choice then did harm."""
    totals = dict.fromkeys(OUTCOMES, 0)
    for upper, harm in found:
        totals[OUTCOMES[2 * (upper > limit) + (harm > HARM)]] += 1
    return totals


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


def missed(rule: Mapping[str, object]) -> list[str]:
    """The rule's limit: of the choices that it trusts on texts that were not measured, 1 of 20."""
    good, bad, *_ = rule["library"].values()
    return [f"{bad} of {good + bad} trusted choices did harm"] if bad > (good + bad) / 20 else []


if __name__ == "__main__":
    fire.Fire(main)

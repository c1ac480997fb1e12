"""Which text chooses the layers, on the real small model: five kinds of text, and a rule checked.

Every text ranks, and its choice is judged on all of them; windows of other lengths, and with bos in
front of every one, rank too. The rule of `experiments.calibration.trust` takes its share from three
kinds of text and is checked on the other two, for several methods and numbers of layers.

    python benchmarks/calibration.py --wikitext wikitext2_test.txt --tasks tasks/ --out FILE

``--tasks`` is a folder with lambada_openai.jsonl, arc_easy.jsonl and piqa.jsonl; code is the Python
that runs this. It continues from the files beside ``--state``.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import fire
import numpy as np
from outcome import begin, finish
from scoring import build

from short_gpt import ShortLlama, calibrate, report
from short_gpt.data import demo
from short_gpt.experiments.calibration import Calibrated, Crossed, WindowScores, agreement
from short_gpt.experiments.calibration.rankings import correlations
from short_gpt.jobs import Readings
from short_gpt.jobs.calibration import windows_apart

FIXED, CHECKED = ("bible", "wikitext", "novels"), ("questions", "code")
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
    counts: Sequence[int] = (2, 4, 8),
    methods: str = "bi,relative_magnitude",
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
    """The share that the texts to fix it by give, and how the rule does on the others.

    A case is a choice by one text; by what it costs on the measured texts the rule says whether it
    may be trusted on one that was not measured, and there it is seen whether it does harm.
    """
    fixing, checking = [], []
    for case in cases:
        cells = {(c.choice, c.text): c for c in case.cells}
        for choice, unseen in product(FIXED, (*FIXED, *CHECKED)):
            if choice == unseen:
                continue
            measured = [t for t in FIXED if t not in (choice, unseen)]
            upper = max(share(cells, choice, t, "excess_most") for t in measured)
            harm = share(cells, choice, unseen, "excess")
            (checking if unseen in CHECKED else fixing).append((upper, harm))
    safe = [s for s in SHARES if not any(u <= s and harm > HARM for u, harm in fixing)]
    held = [s for s in SHARES if s in safe and all(t in safe for t in SHARES if t < s)]
    chosen = max(held, default=0.0)
    return {
        "share": chosen,
        "harm": HARM,
        "fixed_on": counted(fixing, chosen),
        "checked_on": counted(checking, chosen),
        "pairs": {"fixed_on": fixing, "checked_on": checking},
    }


def share(cells: Mapping[tuple[str, str], Crossed], choice: str, text: str, name: str) -> float:
    """What a choice costs on a text beyond the text's own, in parts of that one's cost."""
    return max(0.0, getattr(cells[choice, text], name)) / cells[text, text].nats


def counted(pairs: Sequence[tuple[float, float]], limit: float) -> dict[str, int]:
    """How often the rule trusted, and how often the choice then did harm."""
    names = {(True, False): "trusted, harmless", (True, True): "trusted, harmful"}
    names |= {(False, False): "not trusted, harmless", (False, True): "not trusted, harmful"}
    found = dict.fromkeys(names.values(), 0)
    for upper, harm in pairs:
        found[names[upper <= limit, harm > HARM]] += 1
    return found


def coverage(runs: int = 200) -> dict[str, float]:
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
    """The rule's limit: of the choices that it trusts on texts it was not fixed on, 1 of 20."""
    found = rule["checked_on"]
    trusted = found["trusted, harmless"] + found["trusted, harmful"]
    if found["trusted, harmful"] > trusted / 20:
        return [f"{found['trusted, harmful']} of {trusted} trusted choices did harm"]
    return []


if __name__ == "__main__":
    fire.Fire(main)

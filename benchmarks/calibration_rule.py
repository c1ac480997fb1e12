"""Whom to trust beyond its text: the rule of `experiments.calibration.trust`, checked.

Each of five kinds of text chooses layers, and its choice is judged, as cut, on all of them. On
every three kinds the rule is fixed, and on the other two checked, for several numbers of layers.

    python benchmarks/calibration_rule.py --wikitext wikitext2_test.txt --tasks tasks/ --out FILE

Texts and windows are those of ``calibration.py``. It continues from ``--state``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations

import fire
from calibration import WithBos, documents
from outcome import begin, finish
from scoring import build

from short_gpt import calibrate
from short_gpt.experiments.calibration import SHARE, Calibrated, Crossed
from short_gpt.jobs import Readings
from short_gpt.jobs.calibration import windows_apart

OUTCOMES = ("trusted, harmless", "trusted, harmful", "not, harmless", "not, harmful")
HARM = 0.25  # of what a text's own choice costs: dearer than that is what the rule is to foresee
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


def main(
    wikitext: str,
    tasks: str,
    counts: Sequence[int] = (2, 4, 8),
    size: int = 512,
    count: int = 12,
    judged: int = 8,
    method: str = "bi",
    state: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints what came, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short, found = build(), documents(wikitext, tasks)
    texts, _ = windows_apart(WithBos(short), found, Readings((size,), "first", count, judged))
    options = {"method": method, "healings": ["raw"], "state": state}
    cases = [calibrate(short, texts, n, **options) for n in counts]
    rule = checked(cases)
    print(json.dumps(rule, indent=1))
    content = {
        "windows_to_rank_on": count,
        "windows_to_judge_by": judged,
        "tokens_per_window": size,
        "rule": rule,
        "cases": [case.to_dict() for case in cases],
    }
    if cases[0].state is not None and out is not None:
        cases[0].state.clear()
    finish("calibration_rule", missed(rule), content, out=out, overwrite=overwrite)


def checked(cases: Sequence[Calibrated]) -> dict[str, object]:
    """How the rule does on texts that it was not fixed on, for every three of the texts.

    A case is a choice by one of three texts; by what it costs on those of them that are measured
    the rule says whether it may be trusted on one that is not, and there it is seen whether it does
    harm. Unmeasured is each of the three in turn, by which the share is fixed, and then each other
    text, by which it is checked.
    """
    texts = list(dict.fromkeys(cell.text for cell in cases[0].cells))
    splits, fitted = [], []
    library: dict[int, list[dict[str, int]]] = {case.n: [] for case in cases}
    for fixed in combinations(texts, 3):
        fixing = [pair for unseen in fixed for pair in pairs(cases, fixed, unseen)]
        others = [text for text in texts if text not in fixed]
        checking = [pair for unseen in others for pair in pairs(cases, fixed, unseen)]
        limit = largest(fixing)
        splits.append({"fixed_on": fixed, "share": limit, "checked": counted(checking, limit)})
        fitted.append(splits[-1]["checked"])
        for case in cases:
            own = [pair for unseen in others for pair in pairs([case], fixed, unseen)]
            library[case.n].append(counted(own, SHARE))
    return {
        "harm": HARM,
        "share": SHARE,
        "splits": splits,
        "fitted": summed(fitted),
        "library": summed([found for own in library.values() for found in own]),
        "by_layers": {str(n): summed(own) for n, own in library.items()},
    }


def summed(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Outcomes of all splits together."""
    return {name: sum(one[name] for one in found) for name in OUTCOMES}


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


def missed(rule: Mapping[str, object]) -> list[str]:
    """The rule's limit: of the choices that it trusts on texts that were not measured, 1 of 20."""
    good, bad, *_ = rule["library"].values()
    return [f"{bad} of {good + bad} trusted choices did harm"] if bad > (good + bad) / 20 else []


if __name__ == "__main__":
    fire.Fire(main)

"""README and the pages of ``docs`` as text and tables, and the results that they quote."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ("scoring", "stopping", "stopping_adversarial", "streaming", "greedy", "compare")
RESULTS += ("healing", "reproduce_7b", "draft_4", "draft_8", "serving")
RESULTS += ("larger", "larger_05b", "larger_smollm2", "reasoning", "reasoning_15b")
RESULTS += ("calibration", "tasks", "refit_streamed", "refit_parts", "refit_sinks")
RESULTS += ("refit_usual", "training_rates", "training_rates_05b", "training_rates_smollm2")
RESULTS += ("optimality", "distillation", "refit_choices")
RESULTS += ("coverage", "choice_variance", "own_samples")
RESULTS += ("training_choices", "gemma_kinds", "healing_own", "architectures")
RESULTS += ("peers", "choices", "refit_sinks_05b", "kept", "mixed")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md"))
}


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def measured() -> set[str]:
    """Every number of every result, and every one that README's demo prints, by two decimals."""
    blocks = "".join(re.findall(r"^```.*?^```", PAGES["README.md"], flags=re.M | re.S))
    numbers = [float(text) for text in re.findall(r"\d+\.\d+", blocks)]
    waiting: list[Any] = [result(name) for name in RESULTS]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, float):
            numbers.append(item)
    return {f"{number:.2f}" for number in numbers}


def flowing(page: str) -> str:
    """A page's text on one line, without its Markdown of weight."""
    return " ".join(PAGES[page].replace("**", "").split())


def commands(page: str, program: str) -> list[list[str]]:
    """The arguments of every command of a program that the page shows, in line or as a block."""
    text = PAGES[page].replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [shlex.split(line)[1:] for line in lines if line.split()[:1] == [program]]

"""Word problems that a model answers in its chat template: gsm8k and svamp, without examples.

The prompt is the question alone, the answer greedy, and its last number counts. An answer is well
formed if there is a number at all. Files are those of MosaicML's evaluation, as in ``task_files``:
question (context) and answer. lm-eval has no svamp, and its gsm8k puts five worked examples of the
training set, which are not at hand, before a question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from short_gpt import ShortHFModel

NAMES = ("svamp", "gsm8k")
TOKENS = 128  # of an answer at most
NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


class Problem(NamedTuple):
    """A question and its number."""

    question: str
    answer: str


def read(source: str | Path, name: str, limit: int) -> list[Problem]:
    """The first so many problems of a file."""
    lines = Path(source, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    return [Problem(row["context"], row["answer"]) for row in map(json.loads, lines)]


def last_number(text: str) -> float | None:
    """The last number of a text; None without any.

    Example:
        >>> last_number("18 eggs a day are $1,234.")
        1234.0
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def asked(short: ShortHFModel, problems: Sequence[Problem]) -> dict[str, list[float]]:
    """By metric a value for each problem: whether it is solved, and whether well formed."""
    solved, formed = [], []
    for problem in problems:
        dialog = [{"role": "user", "content": problem.question}]
        prompt = short.tokenizer.apply_chat_template(
            dialog, tokenize=False, add_generation_prompt=True
        )
        ids = short.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        number = last_number(short.decode(short.greedy(ids, TOKENS)))
        solved.append(float(number == last_number(problem.answer)))
        formed.append(float(number is not None))
    return {"exact_match": solved, "well_formed": formed}

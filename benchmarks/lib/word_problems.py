"""Word problems that a model answers in its chat template: gsm8k and svamp, without examples.

The prompt is the question alone. The model answers many at once, greedily, by transformers'
``generate``. The last number of an answer counts, and an answer is well formed if there is one.
Files are those of MosaicML's evaluation, as in ``task_files``: question (context) and answer.
lm-eval has no svamp, and its gsm8k puts five worked examples of the training set, which are not at
hand, before a question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from short_gpt import ShortHFModel

NAMES = ("svamp", "gsm8k")
HARD = "gsm8k"  # small models solve none
ABLE = 0.05  # share of these that the original solves, for others to be asked them
TOKENS = 128  # of an answer at most
BATCH = 25  # problems
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


def judged(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, list[float]]:
    """By metric a value for each problem: whether it is solved, and whether well formed."""
    numbers = [last_number(answer) for answer in answers]
    pairs = zip(numbers, problems, strict=True)
    solved = [float(number == last_number(problem.answer)) for number, problem in pairs]
    return {"exact_match": solved, "well_formed": [float(n is not None) for n in numbers]}


def asked(short: ShortHFModel, problems: Sequence[Problem]) -> dict[str, list[float]]:
    """`judged`, of a model's answers."""
    batches = (problems[i : i + BATCH] for i in range(0, len(problems), BATCH))
    return judged(problems, [answer for batch in batches for answer in answers(short, batch)])


def answers(short: ShortHFModel, problems: Sequence[Problem]) -> list[str]:
    """What a model answers to every problem."""
    prompts = [
        short.tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for problem in problems
    ]
    read = short.tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(short.decoder.device)
    with torch.inference_mode():
        ids = short.model.generate(**read, max_new_tokens=TOKENS, do_sample=False)
    written = ids[:, read["input_ids"].shape[1] :]
    return short.tokenizer.batch_decode(written, skip_special_tokens=True)

"""Prompts that a chat model answers to calibrate on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

BUILT_IN = Path(__file__).with_name("prompts.txt")  # of this project, in no benchmark
WORDS = re.compile(r"([a-z]+): (.+)")
OPEN = re.compile(r"\{([a-z]+|(\d+)-(\d+))\}")  # a word, or a number and its range


def prompts(seed: int = 0, text: int = 0) -> Iterator[str]:
    """Endless prompts of some 370 kinds; their words and numbers are drawn anew each time.

    They depend on ``seed`` and the number of the ``text`` alone that they are for. A text goes
    through the kinds in an order of its own.

    Example:
        >>> next(prompts())[:32]
        'Chidi buys 7 cups at 7 dollars e'
    """
    words, kinds = _built_in()
    draw = np.random.default_rng((seed, text))
    while True:
        for kind in draw.permutation(len(kinds)):
            yield _filled(kinds[kind], words, draw)


def _filled(kind: str, words: dict[str, list[str]], draw: np.random.Generator) -> str:
    """A kind with words and numbers; no word stands in it twice."""
    used = set[str]()

    def filling(match: re.Match[str]) -> str:
        if match[2]:
            return str(draw.integers(int(match[2]), int(match[3]), endpoint=True))
        word = str(draw.choice([word for word in words[match[1]] if word not in used]))
        used.add(word)
        return word

    return OPEN.sub(filling, kind)


@cache
def _built_in() -> tuple[dict[str, list[str]], list[str]]:
    """The words by their names, and the kinds of prompts."""
    lines = BUILT_IN.read_text(encoding="utf-8").splitlines()
    words = {match[1]: match[2].split(", ") for line in lines if (match := WORDS.fullmatch(line))}
    kinds = [line for line in lines if not line.startswith("#") and not WORDS.fullmatch(line)]
    return words, kinds

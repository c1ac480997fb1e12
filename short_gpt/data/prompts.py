"""Prompts that a chat model answers to calibrate on: of this project, or of the user."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np

from short_gpt.data.texts import Conversation

BUILT_IN = Path(__file__).with_name("prompts.txt")  # of this project, in no benchmark
WORDS = re.compile(r"([a-z]+): (.+)")
OPEN = re.compile(r"\{([a-z]+|(\d+)-(\d+))\}")  # a word, or a number and its range


def prompts(seed: int = 0, text: int = 0) -> Iterator[str]:
    """Endless prompts of some 430 kinds; their words and numbers are drawn anew each time.

    They depend on ``seed`` and the number of the ``text`` alone that they are for. A text goes
    through the kinds in an order of its own.

    Example:
        >>> next(prompts())[:32]
        'Extract the number: the train wi'
    """
    words, kinds = _built_in()
    draw = np.random.default_rng((seed, text))
    while True:
        for kind in draw.permutation(len(kinds)):
            yield _filled(kinds[kind], words, draw)


def prompt_of(content: object) -> str | None:
    """A prompt: a text, or messages up to the last of a user's, whose context the others are.

    Of messages it is a `Conversation`, but a lone user's is its text. None where it is neither.

    Example:
        >>> prompt_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
        'Hi'
    """
    if isinstance(content, str):
        return content if content.strip() else None
    messages = (Conversation.of(content) or Conversation("[]")).messages
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    return messages[0]["content"] if len(messages) == 1 else Conversation.of(messages)


def in_turn(every: Sequence[str], seed: int, text: int) -> Iterator[str]:
    """A user's prompts over and over, in one order by ``seed``, for the ``text`` of this number.

    Texts begin as far apart in it as can be, by the golden ratio: a prompt that stands in two of
    them is text that they share.
    """
    order = np.random.default_rng(seed).permutation(len(every))
    first = int(len(every) * (text * 0.6180339887498949 % 1))
    return (every[i] for i in cycle(np.roll(order, -first)))


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

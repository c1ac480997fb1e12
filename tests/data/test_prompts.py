"""The built-in prompts: drawn by a seed, in all kinds, and far from what judges."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from short_gpt.data.prompts import _built_in, in_turn, prompts
from short_gpt.evaluation.answers import questions

DRAWN = 20  # of every kind
NEAR = 5  # words and signs in a row that no prompt has in common with a question


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.fixture(scope="module")
def drawn() -> list[str]:
    count = len(_built_in()[1])
    return [prompt for text in range(DRAWN) for prompt in islice(prompts(0, text), count)]


def test_every_kind_comes_once_in_a_round_and_is_filled(drawn):
    words, kinds = _built_in()
    assert len(kinds) == len({*kinds}) > 250 and all(len({*w}) == len(w) for w in words.values())
    assert not any("{" in prompt or "}" in prompt for prompt in drawn)
    plain = {kind for kind in kinds if "{" not in kind}
    for text in range(DRAWN):
        rounds = drawn[text * len(kinds) : (text + 1) * len(kinds)]
        assert len(rounds) == len(kinds) and plain <= {*rounds}


def test_words_and_numbers_are_drawn_anew_by_seed_and_text(drawn):
    assert [*islice(prompts(0, 3), 5)] == [*islice(prompts(0, 3), 5)]
    firsts = [tuple(islice(prompts(seed, text), 5)) for seed in (0, 1) for text in (0, 1)]
    assert len({*firsts}) == 4
    assert len({*drawn}) > 0.6 * len(drawn)
    for a, b in (re.findall(r"\d+", p) for p in drawn if p.startswith("Subtract")):
        assert 11 <= int(a) <= 49 and 50 <= int(b) <= 99
    words = _built_in()[0]["name"]
    for prompt in drawn:
        if prompt.endswith("Who comes last?"):
            assert len({w for w in words if w in prompt}) == 3  # no name twice


def test_texts_begin_far_apart_in_the_prompts_of_a_user():
    own = [f"p{i}" for i in range(40)]
    firsts = [[*islice(in_turn(own, 0, text), 4)] for text in range(10)]
    assert firsts == [[*islice(in_turn(own, 0, text), 4)] for text in range(10)]
    drawn = Counter(prompt for first in firsts for prompt in first)
    assert len(drawn) >= 30 and max(drawn.values()) == 2  # at random 26, and up to 4 times
    assert sorted(islice(in_turn(own, 0, 7), 40)) == sorted(own)
    assert [*islice(in_turn(own, 1, 0), 40)] != [*islice(in_turn(own, 0, 0), 40)]
    assert [*islice(in_turn(["a"], 0, 5), 3)] == ["a"] * 3


def test_no_prompt_is_near_a_question_that_judges(drawn):
    """Not its text, and no run of `NEAR` words and signs: far less than 8."""
    judged = [question.prompt for question in questions()] + ["What is a king?"]
    near = set().union(*(runs(text, NEAR) for text in judged))
    assert not {*drawn} & {*judged}
    assert not [prompt for prompt in drawn if runs(prompt, NEAR) & near]
    assert runs(f"Now, {judged[0].lower()}", NEAR) & near  # it would be seen

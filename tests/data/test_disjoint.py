"""Windows that share text with others are dropped; the span is never longer than the windows."""

from __future__ import annotations

import pytest
from conftest import random_windows

from short_gpt.data.disjoint import check_disjoint, overlapping, without_overlap


def test_the_windows_kept_stand_in_their_order():
    one, two, three, four = random_windows(4, 100)
    shared = one[:20] + two[10:74] + three[:16]  # 64 tokens in a row
    kept, gone = without_overlap([three, shared, one, two], [two, four])
    assert kept == [three, one] and gone == 2
    assert without_overlap([one], []) == ([one], 0)
    assert without_overlap([], [one]) == ([], 0)


@pytest.mark.parametrize(("size", "run"), [(20, 20), (40, 40), (64, 64), (100, 64)])
def test_the_span_is_the_window_if_that_is_shorter(size, run):
    one, two = random_windows(2, size, seed=1)
    assert overlapping([one[:run] + two[run:]], [one]) == {0: 0}
    if size > run:
        assert overlapping([one[: run - 1] + two[run - 1 :]], [one]) == {}
    with pytest.raises(ValueError, match=f"evaluate on \\({run} tokens in a row"):
        check_disjoint([one], [one])


def test_a_span_can_be_named():
    one, two = random_windows(2, 100, seed=2)
    mixed = one[:10] + two[10:]
    assert without_overlap([mixed], [one]) == ([mixed], 0)
    assert without_overlap([mixed], [one], span=10) == ([], 1)


@pytest.mark.parametrize("size", [8, 50, 63])
def test_a_window_inside_a_longer_one_is_shared_text(size):
    long, other = random_windows(2, 200, seed=3)
    short = long[37 : 37 + size]
    assert overlapping([other, long], [other[:3], short]) == {1: 1}  # to evaluate on: inside
    assert overlapping([other, short, short], [long]) == {1: 0, 2: 0}  # to train on: inside
    assert overlapping([long], [[*short[:-1], 95 - short[-1]]]) == {}
    assert overlapping([long[:30]], [long[10:25]]) == {0: 0}  # both shorter than 64 tokens
    with pytest.raises(ValueError, match="1 of 2 training windows share text"):
        check_disjoint([other, long], [short])


def test_a_few_tokens_are_shared_with_their_equal_alone():
    long, short = random_windows(1, 100, seed=4)[0], [5, 6, 7]
    assert overlapping([long, long[10:17]], [long[10:17], short]) == {1: 0}

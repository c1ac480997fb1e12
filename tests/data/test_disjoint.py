"""Windows that share text with others are dropped, however both are cut."""

from __future__ import annotations

import random

import pytest
from conftest import random_windows, refuses
from hypothesis import example, given, settings
from hypothesis import strategies as st

from short_gpt.data import windows
from short_gpt.data.disjoint import check_disjoint, overlapping, without_overlap
from short_gpt.data.windows import Prefixed, Window


def test_the_windows_kept_stand_in_their_order():
    one, two, three, four = random_windows(4, 100)
    shared = one[:20] + two[10:74] + three[:16]  # 64 tokens in a row
    kept, gone = without_overlap([three, shared, one, two], [two, four])
    assert kept == [three, one] and gone == 2
    assert without_overlap([one], []) == ([one], 0)
    assert without_overlap([], [one]) == ([], 0)


@pytest.mark.parametrize(
    ("size", "run"), [(8, 8), (15, 8), (20, 10), (40, 20), (64, 32), (100, 50), (128, 64)]
)
def test_the_span_is_half_of_the_window_if_that_is_shorter(size, run):
    one, two = random_windows(2, size, seed=1)
    assert overlapping([one[:run] + two[run:]], [one]) == {0: 0}
    if size > run:
        assert overlapping([one[: run - 1] + two[run - 1 :]], [one]) == {}
    refuses("evaluate on, such as number 0 with evaluation window 0", check_disjoint, [one], [one])


def letters(count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("etaoinshr ", k=count))


def cut(text: str, size: int, **options: object) -> list[list[int]]:
    return list(windows([text], lambda t: [*t.encode()], size=size, stride=size, **options))


@given(st.integers(2, 64), st.integers(0, 200), st.integers(0, 2**31 - 1), st.booleans())
@example(size=24, shift=2, seed=0, shuffled=False)
def test_a_copy_that_is_cut_elsewhere_shares_its_text_at_every_size(size, shift, seed, shuffled):
    text, other = letters(500, seed), letters(500, seed + 1)
    order = {"seed": seed} if shuffled else {}
    learned = cut(text, size, **order)
    shared = overlapping(learned, cut(text[shift:], size, **order))
    read = 500 - shift - (500 - shift) % size  # of the copy; its own tail is no window
    touched = {i for i, w in enumerate(learned) if shift - size < w.origin.position < shift + read}
    assert set(shared) == touched
    assert overlapping(learned, cut(other, size, **order)) == {}


@settings(max_examples=30)
@given(st.integers(15, 64), st.integers(0, 63), st.integers(0, 2**31 - 1))
def test_single_windows_of_a_copy_share_at_least_half(size, shift, seed):
    text = letters(300, seed)
    alone = [list(w) for w in cut(text, size)]  # of which nothing tells that they meet
    for window in cut(text[shift : size * len(alone)], size):
        assert overlapping(alone, [list(window)])


PHRASES = ("and the ", "of the lord", "unto the king ", "in the day of ", "he said unto them ")


def verses(seed: int) -> str:
    """A text that has many phrases in common with others of its kind."""
    rng = random.Random(seed)
    return "".join(rng.choice(PHRASES) + letters(rng.randint(2, 9), seed + i) for i in range(300))


@pytest.mark.parametrize("size", [*range(2, 9), 11, 15, 16, 32, 64])
@pytest.mark.parametrize("limit", [8, 64])
def test_a_few_windows_of_a_copy_are_found_where_they_meet_its_own(size, limit):
    """Windows that do not meet each other: the text that they stand in says what they are."""
    text, other = verses(0), verses(1000)
    learned, judged = (cut(t, size, seed=0, limit=limit) for t in (text, other))
    assert overlapping(learned, judged) == {}
    for shift in range(1, 11):
        copied = cut(text[shift:], size, seed=0, limit=limit)
        places = [w.origin.position + shift for w in copied]
        met = {
            i
            for i, w in enumerate(learned)
            if any(abs(w.origin.position - place) < size for place in places)
        }
        found = overlapping(learned, copied)
        assert set(found) == met
        for i, j in found.items():
            assert abs(learned[i].origin.position - places[j]) < size


@pytest.mark.parametrize("order", [{}, {"seed": 0}])
def test_texts_of_one_call_end_where_they_end(order):
    """The run may not go on into the next text."""
    whole = letters(140, 0)

    def windows_of(texts: list[str]) -> list[Window]:
        return [*windows(texts, lambda t: [*t.encode()], size=6, stride=6, tail="keep", **order)]

    one = windows_of([letters(130, 1), whole[:63], whole[63:] + letters(140, 2)])
    assert {one[i].text for i in overlapping(one, windows_of([whole]))} == {1, 2}
    assert {w.text for w in one if whole.encode().find(bytes(w)) >= 0} == {1, 2}
    apart = windows_of([whole[:40] + letters(130, 3), whole[40:63] + letters(130, 4)])
    assert overlapping(apart, windows_of([whole])) == {}


OPENING = [*letters(96, 9).encode()]  # a template's, before every dialog


@pytest.mark.parametrize("size", [8, 32, 96, 100, 128])
@pytest.mark.parametrize("order", [{}, {"seed": 0}])
def test_what_a_template_puts_before_texts_is_no_copy_and_hides_none(size, order):
    def windows_of(texts: list[str], opening: list[int] = OPENING) -> list[Window]:
        tokens = [Prefixed([*opening, *text.encode()], len(opening)) for text in texts]
        return [*windows(tokens, lambda _: [], size=size, stride=size, **order)]

    learned = [letters(300, n) for n in range(4)]
    one = windows_of(learned)
    assert overlapping(one, windows_of([letters(300, 9 + n) for n in range(4)])) == {}
    assert {w.text for w in one} == {*range(4)}
    for copy in (windows_of([learned[2][7:]]), windows_of([learned[2]], [])):
        assert {one[i].text for i in overlapping(one, copy)} == {2}
    whole = [Prefixed([*OPENING, *text.encode()], 96) for text in (*learned, learned[0])]
    assert overlapping(whole[:2], whole[2:]) == {0: 2}  # as a wrapper encodes them
    again = overlapping(one, windows_of(learned))
    assert again.keys() == {*range(len(one))}
    if 96 % size == 0:  # cut as the texts alone, and no window has the opening alone
        assert one == windows_of(learned, [])


def test_bos_goes_before_every_window_and_not_twice_before_a_templates_opening():
    text, encode = letters(300, 0), lambda text: [1, *text.encode()]
    opened = [Prefixed([1, *OPENING, *text.encode()], 97)]
    how = {"size": 97, "stride": 97, "bos": "every"}
    found, alone = (list(windows(texts, encode, **how)) for texts in (opened, [text]))
    assert found == alone and found[0].origin.position == 0
    half = list(windows(opened, encode, **{**how, "size": 65, "stride": 64}))
    assert [w.start for w in half] == [33, 1, 1, 1, 1]


def test_windows_of_a_template_alone_are_none():
    tokens = [Prefixed([*OPENING, 1], len(OPENING))]
    assert [[*w] for w in windows(tokens, lambda _: [], size=97, stride=1)] == [[*OPENING, 1]]
    with pytest.raises(
        ValueError, match="no windows: the longest text has 1 tokens, a window needs 48"
    ):
        list(windows(tokens, lambda _: [], size=48, stride=48))


@pytest.mark.parametrize("size", [8, 50, 63])
def test_a_window_inside_a_longer_one_is_shared_text(size):
    long, other = random_windows(2, 200, seed=3)
    short = long[37 : 37 + size]
    assert overlapping([other, long], [other[:3], short]) == {1: 1}  # to evaluate on: inside
    assert overlapping([other, short, short], [long]) == {1: 0, 2: 0}  # to train on: inside
    less = max(size // 2, 8) - 1
    assert overlapping([long], [short[:less] + other[: size - less]]) == {}
    assert overlapping([long[:30]], [long[10:25]]) == {0: 0}  # both shorter than 64 tokens
    refuses("1 of 2 training windows share text", check_disjoint, [other, long], [short])

"""What a run says of itself while it goes on."""

from __future__ import annotations

import pytest
from conftest import CharTokenizer, make_transformer, random_windows, zero_layer

from short_gpt import ShortLlama
from short_gpt.scoring import run as following
from short_gpt.scoring.run import Following
from short_gpt.scoring.stopping import Stop


class Tiny:
    def __init__(self) -> None:
        self.model, self.tokenizer = make_transformer(), CharTokenizer()
        zero_layer(self.model, 2)


def told(count: int, **options: object) -> list[str]:
    """The lines of a run over so many windows, with nothing between two of them to wait for."""
    lines: list[str] = []
    rule = Stop(1, min_windows=16, rare=0.4)
    follow = Following(lines.append, rule, **{"every": 0.0, **options})
    ShortLlama(Tiny()).measure(
        random_windows(count, 40), batch_size=2, progress=False, follow=follow
    )
    return lines


def test_it_tells_windows_read_the_choice_and_the_closest_pair():
    lines = told(20)
    assert len(lines) == 10
    assert lines[0].startswith("2 windows: [2]; closest layers 2 and ")
    assert lines[0].endswith(" (tested from 16 windows on)")
    assert lines[-1].startswith("20 windows: [2]; closest ") and lines[-1].endswith(" needed")


def test_it_tells_at_the_beginning_and_then_only_after_a_while(monkeypatch):
    assert len(told(20, every=3600.0)) == 1
    seconds = iter(range(0, 10**6, 25))  # a clock that is looked at twice for every line
    monkeypatch.setattr(following.time, "monotonic", lambda: float(next(seconds)))
    assert 1 < len(told(20, every=60.0)) < 10


def test_the_population_is_told_where_it_is_known():
    short = ShortLlama(Tiny())
    short.measure(random_windows(3, 40), progress=False)
    line = Following(print, Stop(2)).line(short.importance, 18_000)
    assert line.startswith("3 of 18,000 windows: [2, ") and "from 295 windows on" in line
    block = Following(print, Stop(2, angular=True)).line(short.importance, None)
    assert "closest blocks that start at " in block


@pytest.mark.parametrize("field", ["n_windows", "influence"])
def test_to_be_followed_changes_no_score(field):
    plain, followed = ShortLlama(Tiny()), ShortLlama(Tiny())
    windows = random_windows(6, 40)
    plain.measure(windows, progress=False)
    follow = Following(lambda _: None, Stop(1), every=0.0)
    followed.measure(windows, progress=False, follow=follow)
    ours, theirs = (getattr(s.importance, field) for s in (plain, followed))
    assert str(ours) == str(theirs)

"""How many layers each dial takes: known answers, and targets that hold for any choice."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from short_gpt import ShortGPTError
from short_gpt.healing.choosing import windows_to_choose
from short_gpt.jobs.shrink_settings import ShrinkSettings
from short_gpt.jobs.shrink_time import MANY, Plan, fitted


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (ShrinkSettings(ratio=0.25), 8),  # 7.5 of 30, to the nearest whole
        (ShrinkSettings(ratio=0.02), 1),
        (ShrinkSettings(n=3), 3),
        (ShrinkSettings(memory="3kB"), 5),
        (ShrinkSettings(memory=2999), 6),
        (ShrinkSettings(params="3k"), 5),
        (ShrinkSettings(layers="3, 12"), 2),
        (ShrinkSettings(curve=(1, 5, 2)), 5),
        (ShrinkSettings(curve="auto", pick=4), 4),
    ],
)
def test_known_answers(settings, count):
    assert settings.count([100] * 30, 500) == count


@given(st.lists(st.integers(1, 50), min_size=4, max_size=7), st.integers(0, 40), st.data())
def test_a_target_holds_whichever_layers_go_and_no_layer_goes_in_vain(layers, rest, data):
    total = sum(layers) + rest
    least = total - sum(sorted(layers)[:-2])
    target = data.draw(st.integers(least, total - 1))
    n = ShrinkSettings(memory=target).count(layers, rest)
    sets = [total - sum(chosen) for chosen in combinations(layers, n)]
    assert max(sets) <= target
    assert max(total - sum(chosen) for chosen in combinations(layers, n - 1)) > target


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.5, "n": 3}, "`ratio` and `n` both say how small"),
        ({"ratio": 1.0}, "`ratio` = 1.0: expected above 0 and below 1"),
        ({"n": 0}, "n = 0"),
        ({"n": 29}, "^n = 29; the model has 30 layers: expected 1 to 28"),
        ({"ratio": 0.99}, "^n = 30; the model has 30 layers: expected 1 to 28"),
        ({"params": "1M"}, "--params 1M: the model is small enough"),
        ({"params": "few"}, "`params` = 'few': expected a number, such as 400k, 1.6M or 1.2B"),
        ({"layers": "3,x"}, "expected layer numbers as in `layers` 3,12"),
        ({"layers": "3,30"}, r"layers \[30\] do not exist; the model has 0..29"),
        ({"layers": "3", "method": "bi"}, "`method` chooses layers, and `layers` names them"),
        ({"curve": "1,2", "pick": 3}, "`pick` = 3: expected one of 1, 2"),
        ({"curve": "1,29"}, "n = 29; the model has 30 layers: expected 1 to 28"),
        ({"memory": "1GB"}, "--memory 1GB: the model is small enough"),
        ({"memory": 600}, "still takes 700 B; name that or more"),
        ({"memory": "much"}, "`memory` = 'much': expected a size with its unit, such as 12GB"),
        ({"memory": "12"}, "`memory` = '12': expected a size with its unit, such as 12GB"),
        ({"time": "soon"}, "`time` = 'soon': expected a time of at most a year, such as 30m"),
        ({"time": 0}, "`time` = 0: expected a time"),
        ({"max_kld": 0.0}, "`max_kld` = 0.0: expected above 0"),
        ({"heal_by": "lora"}, "`heal_by` = 'lora': expected one of refit, patch"),
        ({"max_perplexity_ratio": 0.9}, "`max_perplexity_ratio` = 0.9: expected above 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ShortGPTError, match=message):
        how_small = ShrinkSettings(**settings)
        how_small.check()
        how_small.count([100] * 30, 500)


def test_without_a_size_the_divergence_is_the_limit():
    assert ShrinkSettings().most_kld == 0.1 and ShrinkSettings().size_flag == "--max_kld 0.1"
    assert ShrinkSettings(max_perplexity_ratio=math.exp(0.2)).most_kld == pytest.approx(0.2)
    assert ShrinkSettings(layers=0).size_flag == "--layers 0"
    assert ShrinkSettings(curve=range(1, 4)).size_flag == "--curve 1,2,3"
    for size in ({"n": 2}, {"ratio": 0.25}, {"memory": "3kB"}):
        assert ShrinkSettings(**size).most_kld is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), (30, 1800), ("1.5 hours", 5400), ("2d", 172_800), ("2m", 120)],
)
def test_times(text, seconds):
    assert ShrinkSettings(time=text).seconds == seconds


FULL = Plan("auto", 64, 32)


def seconds(plan: Plan) -> float:
    return {"auto": 100, "greedy_kld": 50, "bi": 0}.get(plan.method, 10) + (plan.windows or 500)


@pytest.mark.parametrize(
    ("most", "named", "plan"),
    [
        (164, {}, FULL),  # as much as the first takes
        (163, {}, ("auto", 48, 24)),
        (100, {}, ("greedy_kld", 48, 16)),
        (1, {}, ("bi", 16, 8)),  # the cheapest, which takes longer
        (100, {"windows": 200, "eval_windows": 5}, ("bi", 200, 5)),
        (60, {"method": "sleb"}, ("sleb", 48, 24)),
        (10_000, {}, FULL),  # no training unless a time is named
        (10_000, {"train_on": MANY}, ("auto", MANY, 32)),
        (10_000, {"train_on": MANY, "windows": 8}, ("auto", 8, 32)),
        (10_000, {"train_on": None}, ("auto", None, 32)),
        (300, {"train_on": MANY}, FULL),  # less than a quarter is left
    ],
)
def test_the_best_plan_that_fits(most, named, plan):
    train_on = named.get("train_on", 0)
    fields = {name: value for name, value in named.items() if name != "train_on"}
    found = fitted(seconds, most, fields, train_on)
    assert found[:3] == plan[:3]
    trains = found.windows != 64 and train_on != 0
    assert found.training == (most - seconds(found) if trains else 0)
    assert found.seconds == (most if trains else seconds(found))


def test_what_a_choice_takes():
    # a round of 2 of 5 layers tries 3 of them: 1 + 2 + 3 and 3 layers run, the next 1 + 2 and 2
    assert windows_to_choose("sleb", 2, 5, 64) == (4 * (6 + 3 + 3 + 2) / 5, 4 * (3 + 2))
    assert windows_to_choose("bi", 2, 5, 64) == (0, 0)  # scores are measured for every method
    few, many = (windows_to_choose("auto", 8, 30, windows) for windows in (16, 64))
    search = windows_to_choose("greedy_kld", 8, 30, 64)
    assert few < many and many[0] <= 60 * 16 + search[0]
    # five sets, of which 28 windows judge one on average
    assert many[1] == 5 * 28 + search[1]
    unknown = windows_to_choose("greedy_kld", None, 24, 32)
    known = windows_to_choose("greedy_kld", 6, 24, 32)  # up to twice the eighth is searched
    assert unknown == (known[0] + 4 * 10 * 8, known[1] + 4 * 8)
    assert windows_to_choose("bi", None, 24, 32) == unknown

"""Results as text: the numbers that stand in the columns."""

from __future__ import annotations

import math
import re

import pytest
import scipy.stats
import torch
from conftest import make_transformer, random_windows

from short_gpt.cli.tables import compared, comparison, perplexities, ranking, search
from short_gpt.data.windows import Window
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.jobs.comparing import Row
from short_gpt.models.decoder import MetaDecoder
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import measure
from short_gpt.selection.search import Search


def test_the_ranking_says_what_its_intervals_are_over():
    decoder, cut = MetaDecoder(make_transformer()), random_windows(6, 12)
    for texts, said in (
        ([0, 1, 2, 0, 1, 2], "6 windows of 3 texts, the texts being the samples"),
        ([0] * 6, "6 windows of 1 text: what other texts would give is not covered; too small "
         "where they overlap"),
    ):  # fmt: skip
        scores = measure(decoder, [[Window(w, t) for w, t in zip(cut, texts, strict=True)]])
        assert f"±: over {said}" in ranking(scores).splitlines()
    unknown = ranking(measure(decoder, [cut])).splitlines()
    assert any("taken as independent: their texts are not known; too small" in x for x in unknown)


def test_the_intervals_of_the_ranking_are_95_percent_ones():
    """Student's, with one degree of freedom less than windows."""
    scores = measure(MetaDecoder(make_transformer()), [random_windows(40, 12)])
    rows = [line.split() for line in ranking(scores).splitlines()[1:6]]
    shown = torch.tensor([[float(cell) for cell in row[1:4]] for row in rows]).double()
    assert torch.allclose(shown[:, 0], scores.block_influence, atol=1e-6)
    ratio = (shown[:, 1] / scores.standard_error).mean().item()
    assert ratio == pytest.approx(scipy.stats.t.ppf(0.975, 39), rel=1e-3)
    assert Importance.empty(range(5)).margin.isnan().all()
    assert [*map(int, shown[:, 2])] == [sorted(shown[:, 0]).index(x) + 1 for x in shown[:, 0]]


def test_a_loss_whose_perplexity_no_float_holds_is_infinite():
    rows = search(Search([4, 2], [{4: 2.0, 2: 9.0}, {2: 710.0}]), "sleb").splitlines()
    assert rows[1].split() == ["4", "2.0000", "7.389"]
    assert rows[2].split() == ["2", "710.0000", "inf"]
    far = search(Search([4, 2], [{4: 0.5, 2: 0.9}, {2: 0.75}]), "greedy_kld")
    assert "KLD, nats" in far and "perplexity" not in far and "loss" not in far


def test_each_perplexity_has_its_ratio_to_the_first():
    one = Perplexity(nats=10.0, tokens=10, windows=2)
    head, first, second, *_ = perplexities({"a": one, "b": Perplexity(20.0, 10, 2)}).splitlines()
    assert head.split()[1] == "ratio" and (first.split()[2], second.split()[2]) == ("1.00", "2.72")


def test_an_evaluation_has_names_for_heads_and_errors_in_brackets():
    bos, accuracy = ", bos in every window", {"piqa acc": 0.75, "piqa acc_stderr": 0.1}
    results = {
        "models/7b": {"layers": 32.0, "t perplexity": 5.5, **accuracy},
        "models/5b": {"layers": 23.0, f"t perplexity{bos}": 7.5, "piqa acc change": -0.25,
                      "piqa acc change_stderr": 0.125, "piqa acc change_p": 0.0625,
                      f"t nats change{bos}": 0.5, f"t nats change_stderr{bos}": 0.25},
    }  # fmt: skip
    head, *rows, last = comparison(results).splitlines()
    assert head.split() == ["7b", "5b"] and last == "in brackets: standard errors"
    assert [re.split("  +", row) for row in rows] == [
        ["layers", "32", "23"],
        ["t perplexity", "5.500"],
        ["piqa acc", "0.75 (0.10)"],
        [f"t perplexity{bos}", "7.500"],
        ["piqa acc change", "-0.25 (0.12), p 0.0625"],
        [f"t: change of the loss, nats a token{bos}", "0.50 (0.25)"],
    ]
    assert comparison({"a/x": {"layers": 1.0}, "b/x": {"layers": 2.0}}).split()[:2] == [
        "a/x",
        "b/x",
    ]


@pytest.mark.parametrize("bos", ["", ", bos in every window"])
def test_an_evaluation_in_mixed_has_its_errors_in_brackets(bos):
    how = f"{bos}, precision mixed"
    ends = {f"t perplexity_low{how}": 5.0, f"t perplexity_high{how}": 6.0}
    row = {f"t perplexity{how}": 5.5, **ends}
    change = {f"t nats change{how}": 0.5, f"t nats change_stderr{how}": 0.25}
    shown = [f"t perplexity{how}", "5.500 (5.000 to 6.000)"]
    _, *rows, last = comparison({"a": row}).splitlines()
    assert [re.split("  +", row) for row in rows] == [shown]
    assert last == "in brackets: 95% intervals of perplexities"
    _, *rows, last = comparison({"a": row, "b": row | change}).splitlines()
    assert [re.split("  +", row) for row in rows] == [
        [*shown, "5.500 (5.000 to 6.000)"],
        [f"t: change of the loss, nats a token{how}", "0.50 (0.25)"],
    ]
    assert last == "in brackets: standard errors; 95% intervals of perplexities"


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (1.13441e-08, 2.4213e-08, "1.1e-08 (2.4e-08)"),
        (0.1200001, 0.01234, "0.120 (0.012)"),
        (475.608, 12.51, "476 (13)"),
        (1 / 3, 0.0, "0.333333 (0)"),
        (1 / 3, math.nan, "0.333333 (nan)"),
    ],
)
def test_a_value_has_the_digits_of_its_error(value, error, shown):
    row = comparison({"a": {"t acc": value, "t acc_stderr": error}}).splitlines()[1]
    assert row.removeprefix("t acc").strip() == shown


def test_a_comparison_names_every_set_of_layers():
    """A line a method, one more a seed; the same set healed is not named twice."""
    cases = [("dense", None, 0, "raw", [])]
    cases += [("bi", None, 1, how, [3]) for how in ("raw", "refit")]
    cases += [("bi", None, 2, "raw", [3, 1])]
    cases += [("random", seed, 1, "raw", [seed + 1]) for seed in (0, 1)]
    rows = [Row(*case, 9.0, 0.1, 0.01, None, None, 10, 1.0) for case in cases]
    lines = compared(rows).splitlines()
    first = lines.index("sets of layers removed      1 layer | 2 layers")
    assert [line.split() for line in lines[first + 1 : first + 5]] == [
        ["bi", "3", "|", "1", "3"],
        ["random,", "seed", "0", "1", "|", "-"],
        ["random,", "seed", "1", "2", "|", "-"],
        [],
    ]

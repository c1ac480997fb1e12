"""Results as text: the numbers that stand in the columns."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from conftest import make_transformer, random_windows

from short_gpt.cli.tables import compared, ranking, search
from short_gpt.data.windows import Window
from short_gpt.jobs.cases import Row
from short_gpt.models.meta import MetaDecoder
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


def test_a_comparison_names_every_set_of_layers():
    """A line a method, one more a seed; the same set healed is not named twice."""
    cases = [("dense", None, 0, "raw", [])]
    cases += [("bi", None, 1, how, [3]) for how in ("raw", "refit")]
    cases += [("bi", None, 2, "raw", [3, 1])]
    cases += [("random", seed, 1, "raw", [seed + 1]) for seed in (0, 1)]
    rows = [Row(*case, 9.0, 0.1, 0.01, None, None, 10, 1.0, 1.0) for case in cases]
    lines = compared(rows).splitlines()
    first = lines.index("sets of layers removed      1 layers | 2 layers")
    assert [line.split() for line in lines[first + 1 : first + 5]] == [
        ["bi", "3", "|", "1", "3"],
        ["random,", "seed", "0", "1", "|", "-"],
        ["random,", "seed", "1", "2", "|", "-"],
        [],
    ]

"""Errors of means over tokens, against statsmodels, and by simulation where windows are alike."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
from conftest import make_transformer, random_windows

from short_gpt.data.windows import Window, batches, text_of, windows
from short_gpt.evaluation.paired import difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.evaluation.sampling import Sample, sampling_error
from short_gpt.experiments.cells import Cells
from short_gpt.models.meta import MetaDecoder
from short_gpt.report import perplexities
from short_gpt.runtime.state import StateFile

WINDOWS = [(0, 30.5, 10), (0, 41.25, 15), (1, 12.0, 6), (2, 70.0, 20), (2, 33.5, 11)]
WINDOWS += [(2, 9.75, 4), (3, 55.0, 20), (3, 52.0, 19)]
SAMPLES = [Sample(*row) for row in WINDOWS]

# statsmodels 0.15.0: with y = nats / tokens and g the texts,
# WLS(y, ones, weights=tokens).fit(cov_type="cluster", cov_kwds={"groups": g}, use_t=True),
# and cov_type="HC1" for windows of one text; bse and half of conf_int
CLUSTERED = (0.1579291787121489, (3.39783923 - 2.39263696) / 2)
ALONE = (0.1460827504905999, (3.24066891 - 2.54980728) / 2)


def test_the_error_over_texts_is_that_of_statsmodels():
    found = sampling_error(SAMPLES)
    assert (found.windows, found.texts, found.degrees) == (8, 4, 3)
    assert found.standard_error == pytest.approx(CLUSTERED[0], rel=1e-12)
    assert found.reach() == pytest.approx(CLUSTERED[1], rel=1e-7)
    assert found.reach(0.9) == pytest.approx(found.reach(sides=1))


@pytest.mark.parametrize("text", [5, None])
def test_the_error_over_windows_of_one_text_is_that_of_statsmodels(text):
    found = sampling_error([s._replace(text=text) for s in SAMPLES])
    assert found.degrees == 7
    assert found.standard_error == pytest.approx(ALONE[0], rel=1e-12)
    assert found.reach() == pytest.approx(ALONE[1], rel=1e-7)
    assert ("1 text: what other texts would" if text else "texts are not known") in found.over


def test_one_unit_has_no_error():
    found = sampling_error([Sample(0, 3.0, 2)])
    assert math.isnan(found.standard_error) and math.isnan(found.reach())


def test_intervals_hold_where_windows_of_a_text_are_alike():
    """12 texts of 8 windows, whose texts differ four times as much as windows of one text."""
    generator, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        text, within = generator.normal(0, 0.4, 12), generator.normal(0, 0.1, (12, 8))
        tokens = generator.integers(50, 150, (12, 8))
        nats = (3 + text[:, None] + within) * tokens
        rows = [Sample(i, nats[i, j], int(tokens[i, j])) for i in range(12) for j in range(8)]
        mean = nats.sum() / tokens.sum()
        covered += abs(mean - 3) < sampling_error(rows).reach()
        alike = [row._replace(text=None) for row in rows]
        naive += abs(mean - 3) < sampling_error(alike).reach()
    assert 0.93 < covered / 1000 < 0.97
    assert naive / 1000 < 0.6  # as if 96 windows were independent


def encode(text: str) -> list[int]:
    return [ord(c) % 90 for c in text]


@pytest.mark.parametrize("seed", [None, 0])
def test_windows_know_their_text(seed):
    texts = ["first text, of some length", "short", "the third, with a beginning of its own"]
    found = list(windows(texts, encode, size=8, stride=8, seed=seed))
    assert {w.text for w in found} == {0, 2}
    assert all(encode(texts[w.text])[:8] == w for w in found if w[:3] == encode(texts[w.text])[:3])
    (kept,) = batches(found, 100)
    assert [text_of(w) for w in kept] == [w.text for w in found]
    for again in (pickle.loads(pickle.dumps(found[0])), copy.deepcopy(found[0])):
        assert again == found[0] and again.text == found[0].text
    assert text_of([1, 2]) is None


def test_perplexity_and_its_changes_count_texts():
    decoder = MetaDecoder(make_transformer())
    cut = [
        Window(w, text) for w, text in zip(random_windows(6, 20), [0, 0, 1, 1, 2, 2], strict=True)
    ]
    parts = losses(decoder, cut, progress=False)
    whole = perplexity(decoder, [cut[:4], cut[4:]])
    assert whole.error.texts == together(parts).error.texts == 3
    assert whole.error.reach() == pytest.approx(together(parts).error.reach(), rel=1e-4)
    low, high = whole.interval()
    assert math.log(high / low) == pytest.approx(2 * whole.error.reach())
    assert "6 windows of 3 texts, the texts being the samples" in perplexities({"a": whole})
    assert f"95%: {low:.3f} to {high:.3f}" in perplexities({"a": whole})
    found = whole.to_dict()
    assert found["texts"] == 3 and found["interval_95"] == [low, high]
    halved = [p.__class__(p.nats / 2, p.tokens, 1, tuple(s._replace(nats=s.nats / 2)
              for s in p.samples)) for p in parts]  # fmt: skip
    change = difference(parts, halved)
    assert change.texts == 3 and change.error.degrees == 2
    assert change.standard_error == pytest.approx(whole.error.standard_error / 2, rel=1e-4)
    assert "paired over 6 windows of 3 texts" in str(change)
    one = perplexity(decoder, [cut[:2]])
    assert "2 windows of 1 text: what other texts would give is not covered" in perplexities(
        {"a": one}
    )


def test_cells_keep_texts_and_read_files_without_them(tmp_path):
    state = StateFile(tmp_path / "c.json", {"a": 1})
    parts = [Perplexity(n, t, 1, (Sample(i, n, t),)) for i, n, t in WINDOWS]
    Cells(state).losses("new", lambda: parts)
    again = Cells(StateFile(tmp_path / "c.json", {"a": 1})).losses("new", list)
    assert sampling_error([p.samples[0] for p in again]) == sampling_error(SAMPLES)
    state.save({"cells": {"old": [[n, t, 1] for _, n, t in WINDOWS]}})
    old = Cells(StateFile(tmp_path / "c.json", {"a": 1})).losses("old", list)
    assert old == parts and old[0].samples[0].text is None
    assert difference(old, parts).texts is None

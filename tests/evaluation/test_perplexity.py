"""Perplexity, its error and its changes; published texts and windows.

Perplexity is exp(total nats / predicted tokens), never a mean of means. Errors are compared with
statsmodels, and by simulation where windows are alike.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import make_transformer, random_windows, refuses

from short_gpt.cli.tables import perplexities
from short_gpt.data.texts import pg19, texts
from short_gpt.data.windows import Window, batches, text_number, windows
from short_gpt.evaluation.perplexity import (
    Difference,
    Perplexity,
    Sample,
    combined,
    difference,
    perplexity,
    protocol,
    sampling_error,
    window_perplexities,
)
from short_gpt.healing.choosing import ResultCache
from short_gpt.models.decoder import MetaDecoder
from short_gpt.runtime.state import StateFile

WINDOWS = [(0, 30.5, 10), (0, 41.25, 15), (1, 12.0, 6), (2, 70.0, 20), (2, 33.5, 11)]
WINDOWS += [(2, 9.75, 4), (3, 55.0, 20), (3, 52.0, 19)]
SAMPLES = [Sample(*row) for row in WINDOWS]


def jackknife(units: dict[int, list[Sample]]) -> float:
    """The error by leaving out one unit after the other."""
    means, every = [], [s for own in units.values() for s in own]
    for left_out in units:
        rest = [s for unit, own in units.items() if unit != left_out for s in own]
        means.append(sum(s.nats for s in rest) / sum(s.tokens for s in rest))
    whole, count = sum(s.nats for s in every) / sum(s.tokens for s in every), len(units)
    return math.sqrt((count - 1) / count * sum((m - whole) ** 2 for m in means))


def test_the_error_over_texts_is_the_jackknifes():
    found = sampling_error(SAMPLES)
    units = {text: [s for s in SAMPLES if s.text == text] for text in range(4)}
    assert (found.windows, found.texts) == (8, 4)
    assert found.standard_error == pytest.approx(jackknife(units), rel=1e-12)
    # texts of 25, 6, 35 and 39 tokens of 105, as odds
    odds = [size / (105 - size) for size in (25, 6, 35, 39)]
    squares = [o * o for o in odds]
    spread = sum(squares) ** 2 - sum(s * s for s in squares) + sum(squares)
    assert found.degrees == pytest.approx(sum(odds) ** 2 / spread, rel=1e-12)
    assert 1.5 < found.degrees < 3
    quantile = scipy.stats.t.ppf(0.975, found.degrees)
    assert found.margin() == pytest.approx(quantile * found.standard_error, rel=1e-12)
    quantile = scipy.stats.t.ppf(0.95, found.degrees)
    assert found.margin(0.9) == pytest.approx(quantile * found.standard_error, rel=1e-12)


@pytest.mark.parametrize("text", [5, None])
def test_the_error_over_windows_of_one_text_is_the_jackknifes(text):
    found = sampling_error([s._replace(text=text) for s in SAMPLES])
    assert 3 < found.degrees < 7
    expected = jackknife({i: [sample] for i, sample in enumerate(SAMPLES)})
    assert found.standard_error == pytest.approx(expected, rel=1e-12)
    assert ("1 text: what other texts would" if text else "texts are not known") in found.over


# statsmodels 0.15.0, four texts of 20 tokens: with y = nats / tokens and g the texts,
# WLS(y, ones, weights=tokens).fit(cov_type="cluster", cov_kwds={"groups": g}, use_t=True);
# bse and half of conf_int
EQUAL = [Sample(*row) for row in [(0, 30.5, 8), (0, 41.25, 12), (1, 50.0, 20), (2, 70.0, 20)]]
EQUAL += [Sample(3, 9.75, 4), Sample(3, 55.0, 16)]
CLUSTERED = (0.2468815927389752, (3.99193741 - 2.42056259) / 2)


def test_the_error_over_texts_of_one_size_is_that_of_statsmodels():
    found = sampling_error(EQUAL)
    assert found.degrees == pytest.approx(3)
    assert found.standard_error == pytest.approx(CLUSTERED[0], rel=1e-12)
    assert found.margin() == pytest.approx(CLUSTERED[1], rel=1e-7)


@pytest.mark.parametrize(
    ("sizes", "texts", "said"),
    [
        ([9], [0], "one window tells nothing of others"),
        ([9, 5], [0, 0], "two windows are too few to estimate an interval"),
        ([9, 5, 5], [0, 1, 1], "two texts are too few to estimate an interval"),
        ([99, 5, 5], [0, 1, 2], "the 3 texts share their tokens too unequally"),
        ([99, 3, 3, 3], None, "the 4 windows share their tokens too unequally"),
    ],
)
def test_where_no_interval_is_honest_it_says_so(sizes, texts, said):
    rows = zip(texts or [None] * len(sizes), sizes, strict=True)
    found = [Sample(text, 2.0 * size + i, size) for i, (text, size) in enumerate(rows)]
    error = sampling_error(found)
    assert not error.has_margin and math.isnan(error.margin())
    assert error.no_interval.startswith(said)
    measured = Perplexity.of(found)
    assert f"no interval: {said}" in perplexities({"a": measured})
    assert "interval_95" not in measured.to_dict()
    assert f"no interval: {said}" in str(difference([measured], [measured]))
    unequal = [Sample(i, 2.0 * size + i, size) for i, size in enumerate([85, 8, 7])]
    assert sampling_error(unequal).has_margin and sampling_error(unequal).margin() > 0


def test_intervals_hold_where_texts_differ_in_length():
    """3 texts of 20, 2 and 2 windows, whose tokens share all that sets texts apart."""
    generator, covered, below = np.random.default_rng(0), 0, 0
    for values in generator.normal(0, 1, (2000, 3)):
        rows = [Sample(i, 100 * n * values[i], 100 * n) for i, n in enumerate((20, 2, 2))]
        error, mean = sampling_error(rows), (20 * values[0] + 2 * sum(values[1:])) / 24
        covered += abs(mean) < error.margin()
        below += mean < error.margin(0.9)
    assert covered / 2000 > 0.93 and below / 2000 > 0.93


def encode(text: str) -> list[int]:
    return [ord(c) % 90 for c in text]


@pytest.mark.parametrize("seed", [None, 0])
def test_windows_know_their_text(seed):
    texts = ["first text, of some length", "short", "the third, with a beginning of its own"]
    found = list(windows(texts, encode, size=8, stride=8, seed=seed))
    assert {w.text for w in found} == {0, 2}
    starts = {number: [] for number in (0, 2)}
    for w in found:
        p = w.origin.position
        assert encode(texts[w.text])[p : p + len(w)] == w
        starts[w.text].append(p)
    assert {number: sorted(own) for number, own in starts.items()} == {
        0: [0, 8, 16],
        2: [0, 8, 16, 24],
    }
    (kept,) = batches(found, 100)
    assert [text_number(w) for w in kept] == [w.text for w in found]
    for again in (pickle.loads(pickle.dumps(found[0])), copy.deepcopy(found[0])):
        assert again == found[0] and again.text == found[0].text
    assert text_number([1, 2]) is None


def test_perplexity_and_its_changes_count_texts():
    decoder = MetaDecoder(make_transformer())
    cut = [
        Window(w, text) for w, text in zip(random_windows(6, 20), [0, 0, 1, 1, 2, 2], strict=True)
    ]
    parts = window_perplexities(decoder, cut, progress=False)
    whole = perplexity(decoder, [cut[:4], cut[4:]])
    assert whole.error.texts == combined(parts).error.texts == 3
    assert whole.error.margin() == pytest.approx(combined(parts).error.margin(), rel=1e-4)
    low, high = whole.interval()
    assert math.log(high / low) == pytest.approx(2 * whole.error.margin())
    assert "6 windows of 3 texts, the texts being the samples" in perplexities({"a": whole})
    assert f"95%: {low:.3f} to {high:.3f}" in perplexities({"a": whole})
    found = whole.to_dict()
    assert found["texts"] == 3 and found["interval_95"] == [low, high]
    halved = [p.__class__(p.nats / 2, p.tokens, 1, tuple(s._replace(nats=s.nats / 2)
              for s in p.samples)) for p in parts]  # fmt: skip
    change = difference(parts, halved)
    assert change.texts == 3 and change.error.degrees == pytest.approx(2)
    assert change.standard_error == pytest.approx(whole.error.standard_error / 2, rel=1e-4)
    assert "paired over 6 windows of 3 texts" in str(change)
    one = perplexity(decoder, [[Window(w, 0) for w in cut[:3]]])
    assert "3 windows of 1 text: what other texts would give is not covered" in perplexities(
        {"a": one}
    )
    assert perplexity(decoder, [[Window(cut[0], 0)]]).error.over.startswith("1 window of 1 text")


def test_the_texts_of_a_difference_are_known_where_both_sides_name_the_same():
    named = [Perplexity.of([sample]) for sample in SAMPLES]
    for text in (None, 9):  # not known on one side, or others there
        others = [Perplexity.of([s._replace(text=text, nats=s.nats + i)]) for i, s in
                  enumerate(SAMPLES)]  # fmt: skip
        for pair in ((named, others), (others, named)):
            change = difference(*pair)
            assert change.texts is None and change.windows == 8
            assert change.degrees > 3  # of eight windows, not of four texts
    assert difference(named, named).texts == 4


def test_windows_of_parts_that_hold_several_add_up():
    parts = [Perplexity.of(SAMPLES[:3]), Perplexity.of(SAMPLES[3:])]
    whole = combined(parts)
    assert whole.windows == 8 and whole == Perplexity.of(SAMPLES)
    refuses("losses of the same windows, got 8 windows and 3", difference, parts, parts[:1])


def test_what_a_kill_left_of_a_measurement_goes_with_its_value(tmp_path, monkeypatch):
    def search(part):
        part.save({"found": 3})
        return 3

    with monkeypatch.context() as killed:
        killed.setattr(StateFile, "clear", lambda self: None)  # as if it was killed before
        ResultCache(StateFile(tmp_path / "s", {"a": 1})).resumed("a search", search)
    assert (tmp_path / "s.a-search").exists()
    assert ResultCache(StateFile(tmp_path / "s", {"a": 1})).resumed("a search", search) == 3
    assert not (tmp_path / "s.a-search").exists()


def test_cells_keep_what_windows_gave(tmp_path):
    state = StateFile(tmp_path / "c.json", {"a": 1})
    parts = [Perplexity.of([Sample(i, n, t, n / 2, t - 1)]) for i, n, t in WINDOWS]
    ResultCache(state).perplexities("new", lambda: parts)
    again = ResultCache(StateFile(tmp_path / "c.json", {"a": 1})).perplexities("new", list)
    assert again == parts and [p.samples for p in again] == [p.samples for p in parts]


# values


def test_ragged_windows_weigh_by_their_tokens():
    model = make_transformer()
    windows = [w[:n] for w, n in zip(random_windows(3, 30), (30, 2, 11), strict=True)]
    nats = [
        F.cross_entropy(model(torch.tensor([w]))[0, :-1], torch.tensor(w[1:]), reduction="sum")
        for w in windows
    ]
    found = perplexity(MetaDecoder(model), [windows[:2], windows[2:]])
    assert found.tokens == 29 + 1 + 10
    assert found.value == pytest.approx(math.exp(sum(nats).item() / 40), rel=1e-5)


def test_hopeless_models_have_infinite_perplexity():
    assert Perplexity(nats=1e6, tokens=10, windows=1).value == math.inf


@pytest.mark.parametrize(("nats", "ratio"), [(709, "8.2184e+307"), (710, "inf"), (-800, "0.0")])
def test_a_change_that_no_ratio_can_hold_is_still_told(nats, ratio):
    """exp(710) is more than a float of 64 bits holds."""
    said = str(Difference(nats, 0.5, 12, 3))
    assert said.startswith(f"{nats:+.4f} nats a token") and "paired over 12 windows" in said
    shown = said.split("perplexity x ")[1].split(";")[0]
    assert float(shown) == pytest.approx(float(ratio), rel=1e-4)


def test_a_change_of_one_window_has_no_error():
    one = [Perplexity.of([Sample(0, nats, 4)]) for nats in (8.0, 6.0)]
    said = str(difference([one[0]], [one[1]]))
    assert said.startswith("-0.5000 nats a token (no interval: one window tells nothing of others)")
    assert "nan" not in said
    assert "(standard error 0.5000, no interval: two" in str(Difference(0.0, 0.5, 2, 2))


def test_the_end_of_an_interval_that_no_float_holds_is_infinite():
    samples = [Sample(text, nats, 1) for text, nats in enumerate((600.0, 700.0, 800.0))]
    low, high = Perplexity.of(samples).interval()
    half = scipy.stats.t.ppf(0.975, 2) * 100 / math.sqrt(3)
    assert math.log(low) == pytest.approx(700 - half) and high == math.inf
    assert Perplexity.of(samples).to_dict()["interval_95"] == [low, math.inf]


def test_no_interval_begins_below_a_perplexity_of_1():
    certain = Perplexity.of([Sample(text, nats, 1) for text, nats in enumerate((0.1, 0.2, 0.6))])
    low, high = certain.interval()
    assert certain.error.margin() > 0.3 and low == 1.0
    assert math.log(high) == pytest.approx(0.3 + certain.error.margin())
    assert all(map(math.isnan, Perplexity(0.3, 1, 1).interval()))


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens; nothing was predicted"):
        perplexity(MetaDecoder(make_transformer()), [[[5], [6]]])


def test_nan_logits_are_refused():
    model = make_transformer()
    with torch.no_grad():
        model.output.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite loss"):
        perplexity(MetaDecoder(model), [random_windows(1, 8)])


def test_a_perplexity_shows_itself():
    assert repr(Perplexity(4.0, 4, 2)) == "Perplexity(2.718, nats=4.0, tokens=4, windows=2)"
    several = Perplexity.of([Sample(text, nats, 4) for text, nats in enumerate((3.0, 4.0, 5.0))])
    low, high = several.interval()
    assert f"(2.718, 95% {low:.3f} to {high:.3f}, nats=12.0" in repr(several)
    assert "<td>2.718</td>" in several._repr_html_()


# published texts and windows

# bos once a text, then the characters
BOS = -1


def with_bos(text: str) -> list[int]:
    return [BOS, *map(ord, text)]


def local_copy(folder: Path, split: str, rows: list[str]) -> Path:
    folder.mkdir()
    for name, own in ((split, rows), ("train", ["not these"])):
        lines = (json.dumps({"text": text}) for text in own)
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_wikitext_is_one_text_of_joined_rows(tmp_path):
    source = local_copy(tmp_path / "wiki", "test", ["", " = A = \n", "word"])
    whole = with_bos("\n\n = A = \n\n\nword")
    found = protocol("wikitext-2", with_bos, size=5, source=source)
    assert found == [whole[0:5], whole[5:10], whole[10:15]]  # the rest of 18 is dropped
    assert protocol("wikitext-2", with_bos, size=5, limit=2, source=source) == found[:2]


def test_c4_is_256_windows_of_the_first_1100_texts(tmp_path):
    rows = [f"{n:04}" for n in range(1200)]
    source = local_copy(tmp_path / "c4", "validation", rows)
    whole = with_bos(" ".join(rows[:1100]))
    found = protocol("c4", with_bos, size=20, source=source)
    assert len(found) == 256
    assert [token for window in found for token in window] == whole[: 256 * 20]
    assert len(protocol("c4", with_bos, size=50, source=source)) == len(whole) // 50
    assert protocol("c4", with_bos, size=20, limit=3, source=source) == found[:3]
    assert len(protocol("c4", with_bos, size=20, limit=300, source=source)) == 256


def test_pg19_windows_do_not_cross_books(tmp_path):
    source = local_copy(tmp_path / "pg19", "test", ["abcdefg", "hi", "jklm"])
    found = protocol("pg19", with_bos, size=4, source=source)
    assert found == [with_bos("abc"), [*map(ord, "defg")], with_bos("jkl")]


def test_ptb_is_one_line_of_a_local_copy(tmp_path):
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n mr. <unk> N \n")
    whole = with_bos("no it was n't mr. <unk> N")
    found = protocol("ptb", with_bos, size=6, source=tmp_path / "ptb.test.txt")
    assert [token for window in found for token in window] == whole[: len(whole) // 6 * 6]
    rows = [{"sentence": "no it was n't"}, {"sentence": "mr. <unk> N"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert protocol("ptb", with_bos, size=6, source=str(tmp_path / "test.jsonl")) == found
    refuses("ptb needs a local copy: pass `source`", protocol, "ptb", with_bos)


@pytest.mark.parametrize(
    ("name", "prefix"), [("ptb", "ptb."), ("wikitext-2", "wiki_"), ("c4", "c4-")]
)
def test_of_files_named_by_split_only_the_split_is_read(tmp_path, name, prefix):
    split = "validation" if name == "c4" else "test"
    for other in ("train", "valid", split):
        (tmp_path / f"{prefix}{other}.txt").write_text(f"of {other}")
    found = protocol(name, with_bos, size=4, source=tmp_path)
    assert [token for window in found for token in window] == with_bos(f"of {split}")[
        : 4 * len(found)
    ]
    (tmp_path / f"{prefix}{split}.txt").unlink()
    expected = f"has files of train, valid, and none of {split}: name the file or folder to read"
    refuses(expected, protocol, name, with_bos, size=4, source=tmp_path)


def test_unknown_names_and_short_texts_are_refused(tmp_path):
    refuses("protocol 'x' is unknown: .* wikitext-2, c4, ptb, pg19", protocol, "x", with_bos)
    source = local_copy(tmp_path / "wiki", "test", ["short"])
    refuses("longest text has 6 tokens", protocol, "wikitext-2", with_bos, source=source)


@pytest.mark.parametrize("name", ["wikitext-2", "c4", "pg19"])
def test_without_a_network_the_error_says_what_to_do(name):
    refuses("cannot be reached .* a local copy", protocol, name, with_bos, error=ConnectionError)


def test_a_word_of_a_title_is_no_split(tmp_path):
    for name in ("emma", "the-last-test", "the-great-train-robbery"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert len([*texts(tmp_path, split="test")]) == len([*pg19("test", path=tmp_path)]) == 3

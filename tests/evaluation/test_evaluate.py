"""Perplexity is exp(total nats / predicted tokens), never a mean of means."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import make_transformer, random_windows

from short_gpt.evaluation.perplexity import Difference, Perplexity, Sample, difference, perplexity
from short_gpt.models.decoder import MetaDecoder


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
